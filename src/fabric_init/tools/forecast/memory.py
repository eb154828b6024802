"""Estimate the memory that training takes on each rank, without activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fabric_init.planning.tensors import TensorInfo
from fabric_init.strategies.fsdp2 import Units, units_of
from fabric_init.tools.forecast.coverage import bytes_of
from fabric_init.tools.forecast.strategy_costs import Step, Unit
from fabric_init.tools.forecast.training_config import TrainingConfig


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank, padding included; the same on all ranks. Activations and kernel workspaces are not included.

    Attributes:
        weights: parameters as the strategy keeps them, and buffers.
        masters: the copy of the weights that the optimizer updates, if there is one.
        gradients: kept between the backward pass and the step.
        optimizer: the state of the optimizer.
        passing: the peak of what is allocated and freed within a step: gathered parameters and their gradients,
            communication buckets, copies in lower precision.
        filling: the peak of what is allocated beside the weights while the model is filled.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    passing: int
    filling: int

    @property
    def kept(self) -> int:
        """What stays allocated from step to step."""
        return self.weights + self.masters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most that is allocated at once, when filling or training."""
        return max(self.kept + self.passing, self.weights + self.filling)


def gathered_units(model: nn.Module, units: Units | None, setting: TrainingConfig) -> list[Unit]:
    """Return the units of ``model`` under FSDP, inner before outer and the model last; none for other strategies.

    Args:
        model: not sharded.
        units: see :func:`fabric_init.forecast`.
        setting: strategy and precision.
    """
    if not setting.model.gathers:
        return []
    units = units if units is not None else setting.model.default_units
    dtype = setting.dtypes.computed or setting.dtypes.kept
    seen: set[int] = set()
    gathered = []
    for module in (*(() if units is None else units_of(model, units)), model):
        weights = gradients = 0
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                nbytes = parameter.numel() * (dtype or parameter.dtype).itemsize
                weights += nbytes
                gradients += nbytes if parameter.requires_grad and setting.trains else 0
        gathered.append(Unit(weights, gradients))
    return gathered


def memory_of(slots: Sequence[TensorInfo], units: Sequence[Unit], setting: TrainingConfig) -> Memory:
    """Return what each rank needs.

    Args:
        slots: the tensors of the model, as they are kept.
        units: of :func:`gathered_units`.
        setting: strategy, precision and optimizer.
    """
    strategy, masters = setting.model, setting.dtypes.masters
    parameters = [slot for slot in slots if slot.kind == "parameter"]
    trained = [slot for slot in parameters if slot.requires_grad and setting.trains]
    step = Step(parameters, trained, units, setting.ranks, setting.dtypes)
    buffers = sum(bytes_of(slot) for slot in slots if slot.kind != "parameter")
    return Memory(
        weights=step.nbytes(parameters, strategy.kept) + buffers,
        masters=0 if masters is None else step.nbytes(trained, strategy.updated, masters),
        gradients=step.nbytes(trained, strategy.updated),
        optimizer=setting.states * step.nbytes(trained, strategy.updated, masters),
        passing=strategy.transient(step),
        filling=max(unit.weights for unit in units) if strategy.fills_units else 0,
    )
