"""How much memory training takes on each rank, activations aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from fabric_init.planning.tensors import TensorInfo
from fabric_init.strategies.fsdp2 import Units, units_of
from fabric_init.tools.forecast.coverage import bytes_of
from fabric_init.tools.forecast.io_estimate import REGIONS
from fabric_init.tools.forecast.training_config import TrainingConfig

# As Lightning's DeepSpeedStrategy, and DeepSpeed where that says nothing, configure it; in elements.
_REDUCE_BUCKET = 200_000_000
_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank, padding included: the same on all. Activations, and what kernels work in, are not in it.

    Attributes:
        weights: parameters as the strategy keeps them, and buffers.
        masters: the optimizer's own copy of the weights, where it has one.
        gradients: between the backward pass and the step.
        optimizer: its states.
        passing: what comes and goes in a step, at its most: gathered parameters and their gradients, buckets for
            communication, copies in lower precision.
        filling: what comes and goes while the model is filled, beside the weights.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    passing: int
    filling: int

    @property
    def kept(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return max(self.kept + self.passing, self.weights + self.filling)


class Unit(NamedTuple):
    """Parameters that FSDP gathers together: bytes of all of them, and of their gradients, when they are whole."""

    weights: int
    gradients: int


def gathered_units(model: nn.Module, units: Units | None, setting: TrainingConfig) -> list[Unit]:
    """The units of ``model`` under FSDP, inner before outer; the model itself is the last. None in other strategies.

    Args:
        model: not sharded.
        units: see :func:`fabric_init.forecast`.
        setting: strategy and precision.
    """
    if setting.strategy not in ("fsdp", "fsdp2"):
        return []
    if units is None and setting.strategy == "fsdp2":
        units = "blocks"
    dtype = setting.numbers.computed or setting.numbers.kept
    seen: set[int] = set()
    found = []
    for module in (*(() if units is None else units_of(model, units)), model):
        weights = gradients = 0
        for parameter in module.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                nbytes = parameter.numel() * (dtype or parameter.dtype).itemsize
                weights += nbytes
                gradients += nbytes if parameter.requires_grad and setting.trains else 0
        found.append(Unit(weights, gradients))
    return found


def memory_of(slots: Sequence[TensorInfo], units: Sequence[Unit], setting: TrainingConfig) -> Memory:
    """What each rank needs.

    Args:
        slots: the model's tensors, as they are kept.
        units: of :func:`gathered_units`.
        setting: strategy, precision and optimizer.
    """
    masters, strategy = setting.numbers.masters, setting.strategy
    parameters = [slot for slot in slots if slot.kind == "parameter"]
    trained = [slot for slot in parameters if slot.requires_grad and setting.trains]
    part = _part_of(setting)
    updated = part
    if strategy in ("deepspeed_stage_1", "deepspeed_stage_2"):  # they cut what belongs to the optimizer
        updated = _equal_part(setting)
    return Memory(
        weights=_bytes(parameters, part) + sum(bytes_of(slot) for slot in slots if slot.kind != "parameter"),
        masters=0 if masters is None else _bytes(trained, updated, masters),
        gradients=_bytes(trained, updated),
        optimizer=setting.states * _bytes(trained, updated, masters),
        passing=_passing(parameters, trained, units, setting),
        filling=max(unit.weights for unit in units) if strategy == "fsdp" else 0,
    )


_Elements = Callable[[torch.Size], int]


def _part_of(setting: TrainingConfig) -> _Elements:
    """How many elements of a parameter of some shape a rank has memory for."""
    if (region := REGIONS.get(setting.strategy)) is not None:
        return cache(lambda shape: region(shape, 0, setting.ranks).numel)  # others are padded to that
    return _equal_part(setting) if setting.strategy == "fsdp" else torch.Size.numel


def _equal_part(setting: TrainingConfig) -> _Elements:
    return lambda shape: -(-shape.numel() // setting.ranks)


def _bytes(slots: Sequence[TensorInfo], elements: _Elements, dtype: torch.dtype | None = None) -> int:
    return sum(elements(slot.shape) * (dtype or slot.dtype).itemsize for slot in slots)


def _passing(
    parameters: Sequence[TensorInfo], trained: Sequence[TensorInfo], units: Sequence[Unit], setting: TrainingConfig
) -> int:
    """The most that comes and goes in a step."""
    gradients = _bytes(trained, torch.Size.numel)
    if setting.strategy.startswith("deepspeed"):
        return _passing_in_deepspeed(parameters, trained, gradients, setting)
    copies = 0
    if setting.numbers.autocast is not None:  # what matrix products use, kept for the backward pass
        matrices = [slot for slot in trained if len(slot.shape) > 1]
        copies = _bytes(matrices, torch.Size.numel, setting.numbers.autocast)
    if setting.strategy in ("fsdp", "fsdp2"):
        *inner, root = units
        largest = max(inner, default=Unit(0, 0))
        # one unit is at work, the next is on its way; of the one before it, gradients are on their way
        within = root.weights + root.gradients + 2 * (largest.weights + largest.gradients)
        around = root.weights + max(root.weights, 2 * root.gradients)
        return copies + max(within, around)
    return copies + (gradients if setting.ranks > 1 else 0)  # DDP's buckets


def _passing_in_deepspeed(
    parameters: Sequence[TensorInfo], trained: Sequence[TensorInfo], gradients: int, setting: TrainingConfig
) -> int:
    itemsize = max((slot.dtype.itemsize for slot in parameters), default=0)
    bucket = _REDUCE_BUCKET * itemsize if trained else 0
    in_fp32 = _bytes(trained, _equal_part(setting), torch.float32)  # of gradients, for the step
    if setting.strategy == "deepspeed_stage_3":
        live = min(_bytes(parameters, torch.Size.numel), _LIVE_PARAMETERS * itemsize)
        return bucket + max(live, in_fp32)
    if setting.strategy == "deepspeed_stage_2":
        return max(2 * bucket, in_fp32)  # one bucket fills while the other is sent
    return max(2 * bucket + gradients, in_fp32)
