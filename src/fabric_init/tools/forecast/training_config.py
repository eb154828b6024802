"""The training configuration of a forecast: the arguments that Fabric would get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import get_args

from lightning.fabric.plugins import DoublePrecision, HalfPrecision

from fabric_init.option_names import OptimizerName, PrecisionName, StrategyName
from fabric_init.planning.tensors import TensorInfo
from fabric_init.tools.forecast.strategy_costs import STRATEGIES, Dtypes, StrategyCosts

_STATES: Mapping[OptimizerName, int] = {
    "adamw": 2,
    "adam": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd-momentum": 1,
    "sgd": 0,
    "none": 0,
}
"""Values that an optimizer of ``torch.optim`` keeps for each weight."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is to be trained, in the names of Lightning's Fabric.

    Args:
        strategy: ``"auto"`` is resolved to a single device, or to DDP with several ranks.
        devices: ranks per machine.
        nodes: machines.
        precision: of weights and training.
        optimizer: ``"none"`` for no training.

    Raises:
        ValueError: a name is unknown, a number is below one, or Lightning refuses the combination.
    """

    strategy: StrategyName = "auto"
    devices: int = 1
    nodes: int = 1
    precision: PrecisionName = "32-true"
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        if min(self.devices, self.nodes) < 1:
            raise ValueError(f"devices={self.devices}, nodes={self.nodes}: there has to be at least one of each")
        _check_name("strategy", self.strategy, get_args(StrategyName))
        _check_name("precision", self.precision, get_args(PrecisionName))
        _check_name("optimizer", self.optimizer, get_args(OptimizerName))
        if self.strategy == "auto":
            object.__setattr__(self, "strategy", "ddp" if self.ranks > 1 else "single_device")
        if self.model.single_rank and self.ranks > 1:
            raise ValueError(f"strategy={self.strategy!r} is for one rank, and there are {self.ranks}")
        if self.precision in self.model.refused:
            fits = ", ".join(name for name in get_args(PrecisionName) if name not in self.model.refused)
            raise ValueError(f"strategy={self.strategy!r} does not do precision={self.precision!r}; it does {fits}")

    @property
    def ranks(self) -> int:
        """The number of ranks on all machines."""
        return self.devices * self.nodes

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self.optimizer != "none"

    @property
    def states(self) -> int:
        """Values that the optimizer keeps for each weight."""
        return _STATES[self.optimizer]

    @property
    def model(self) -> StrategyCosts:
        """What is known of the strategy."""
        return STRATEGIES[self.strategy]

    @property
    def dtypes(self) -> Dtypes:
        """The dtypes that are kept."""
        return self.model.dtypes(self.precision)

    def building(self) -> AbstractContextManager[None]:
        """Return the context in which Lightning runs a constructor under this precision."""
        if self.precision == "16-true":
            return HalfPrecision("16-true").module_init_context()
        if self.precision == "bf16-true":
            return HalfPrecision("bf16-true").module_init_context()
        if self.precision == "64-true":
            return DoublePrecision().module_init_context()
        return nullcontext()

    def kept(self, slot: TensorInfo) -> TensorInfo:
        """Return ``slot`` in the dtype that it is kept in."""
        dtype = self.dtypes.kept
        is_number = slot.dtype.is_floating_point and slot.kind != "attribute"
        return slot._replace(dtype=dtype) if dtype is not None and is_number else slot


def _check_name(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{what}={name!r} is not known here; known are {', '.join(known)}")
