"""Where a model is to be trained, and in which numbers: what Fabric would be told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from lightning.fabric.plugins import DoublePrecision, HalfPrecision

from fabric_init.planning.tensors import TensorInfo

_HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

PrecisionName = Literal["bf16-true", "16-true", "32-true", "64-true", "bf16-mixed", "16-mixed"]
StrategyName = Literal[
    "auto",
    "single_device",
    "ddp",
    "fsdp",
    "fsdp2",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
]
OptimizerName = Literal["adamw", "adam", "adagrad", "rmsprop", "sgd-momentum", "sgd", "none"]

# What Lightning refuses, strategy by strategy.
_REFUSED: Mapping[str, frozenset[str]] = {
    "fsdp": frozenset({"64-true"}),
    "fsdp2": frozenset({"64-true", "16-mixed"}),
    "deepspeed_stage_1": frozenset({"64-true"}),
    "deepspeed_stage_2": frozenset({"64-true"}),
    "deepspeed_stage_3": frozenset({"64-true"}),
}

_STATES: Mapping[OptimizerName, int] = {
    "adamw": 2,
    "adam": 2,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd-momentum": 1,
    "sgd": 0,
    "none": 0,
}
"""Numbers that an optimizer keeps for each weight, as ``torch.optim`` makes it."""


class Dtypes(NamedTuple):
    """In which dtypes a strategy keeps what it trains. ``None``: the dtype that the model was built with."""

    kept: torch.dtype | None
    """Of parameters and buffers."""
    masters: torch.dtype | None = None
    """Of the second copy that the optimizer works on; ``None`` for no second copy."""
    computed: torch.dtype | None = None
    """Of parameters that are gathered, and of their gradients before they are cut."""
    autocast: torch.dtype | None = None
    """Of the copies that ``torch.autocast`` makes of weights."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is to be trained. Names as Lightning's Fabric has them.

    Args:
        strategy: ``"auto"`` becomes one device, or DDP where there are several ranks.
        devices: ranks a machine.
        nodes: machines.
        precision: of weights and training.
        optimizer: ``"none"`` is no training at all.

    Raises:
        ValueError: a name is none of these, a number is below one, or Lightning refuses them together.
    """

    strategy: StrategyName = "auto"
    devices: int = 1
    nodes: int = 1
    precision: PrecisionName = "32-true"
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        if min(self.devices, self.nodes) < 1:
            raise ValueError(f"devices={self.devices}, nodes={self.nodes}: there has to be at least one of each")
        _require("strategy", self.strategy, get_args(StrategyName))
        _require("precision", self.precision, get_args(PrecisionName))
        _require("optimizer", self.optimizer, get_args(OptimizerName))
        if self.strategy == "auto":
            object.__setattr__(self, "strategy", "ddp" if self.ranks > 1 else "single_device")
        if self.strategy == "single_device" and self.ranks > 1:
            raise ValueError(f"strategy='single_device' is for one rank, and there are {self.ranks}")
        if self.precision in _REFUSED.get(self.strategy, ()):
            fits = ", ".join(one for one in get_args(PrecisionName) if one not in _REFUSED[self.strategy])
            raise ValueError(f"strategy={self.strategy!r} does not do precision={self.precision!r}; it does {fits}")

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes

    @property
    def trains(self) -> bool:
        return self.optimizer != "none"

    @property
    def states(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        return _STATES[self.optimizer]

    @property
    def sharded(self) -> bool:
        """Whether a rank keeps only a part of each parameter."""
        return self.strategy in ("fsdp", "fsdp2", "deepspeed_stage_3")

    @property
    def numbers(self) -> Dtypes:
        half = _HALF.get(self.precision)
        mixed = self.precision.endswith("-mixed")
        if self.strategy.startswith("deepspeed"):
            return Dtypes(half, masters=torch.float32)  # a second copy in fp32, too
        if self.strategy == "fsdp":
            return Dtypes(None if mixed else half or torch.float32, computed=half)
        if mixed:
            return Dtypes(None, autocast=half)
        return Dtypes(torch.float64 if self.precision == "64-true" else half)

    def building(self) -> AbstractContextManager[None]:
        """What a constructor runs in, under this precision."""
        if self.precision == "16-true":
            return HalfPrecision("16-true").module_init_context()
        if self.precision == "bf16-true":
            return HalfPrecision("bf16-true").module_init_context()
        if self.precision == "64-true":
            return DoublePrecision().module_init_context()
        return nullcontext()

    def kept(self, slot: TensorInfo) -> TensorInfo:
        """``slot`` in the dtype that it is kept in."""
        dtype = self.numbers.kept
        is_number = slot.dtype.is_floating_point and slot.kind != "attribute"
        return slot._replace(dtype=dtype) if dtype is not None and is_number else slot


def _require(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{what}={name!r} is not known here; known are {', '.join(known)}")
