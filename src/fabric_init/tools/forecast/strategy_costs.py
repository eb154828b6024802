"""Small models of the strategies: what each rank keeps, reads, and allocates within a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from fabric_init.checkpoints import Region
from fabric_init.option_names import PrecisionName
from fabric_init.planning.tensors import TensorInfo
from fabric_init.strategies import fsdp2, zero3
from fabric_init.strategies.fsdp2 import Units

_HALF = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}

# As Lightning's DeepSpeedStrategy and DeepSpeed's defaults configure it; in elements.
_REDUCE_BUCKET = 200_000_000
_LIVE_PARAMETERS = 1_000_000_000


class Dtypes(NamedTuple):
    """The dtypes in which a strategy keeps what it trains. ``None``: the dtype that the model was built with."""

    kept: torch.dtype | None
    """Of parameters and buffers."""
    masters: torch.dtype | None = None
    """Of the second copy that the optimizer updates; ``None`` for no second copy."""
    computed: torch.dtype | None = None
    """Of gathered parameters, and of their gradients before they are sharded."""
    autocast: torch.dtype | None = None
    """Of the copies that ``torch.autocast`` makes of weights."""


class Unit(NamedTuple):
    """Parameters that FSDP gathers together: the bytes of all of them and of their gradients, unsharded."""

    weights: int
    gradients: int


class Step(NamedTuple):
    """The inputs of the transient memory of a training step."""

    parameters: Sequence[TensorInfo]
    trained: Sequence[TensorInfo]
    units: Sequence[Unit]
    ranks: int
    dtypes: Dtypes

    def nbytes(self, tensors: Sequence[TensorInfo], elements: Elements, dtype: torch.dtype | None = None) -> int:
        """Return the bytes of ``elements`` of each tensor."""
        return sum(elements(tensor.shape, self.ranks) * (dtype or tensor.dtype).itemsize for tensor in tensors)


Elements = Callable[[torch.Size, int], int]
"""The elements of a parameter that a rank keeps, by shape and number of ranks."""


def all_elements(shape: torch.Size, ranks: int) -> int:
    """Return the elements of an unsharded parameter."""
    return shape.numel()


def _equal_part(shape: torch.Size, ranks: int) -> int:
    return -(-shape.numel() // ranks)


@cache
def _fsdp2_part(shape: torch.Size, ranks: int) -> int:
    return fsdp2.region_on(shape, 0, ranks).numel  # other ranks are padded to this size


@cache
def _zero3_part(shape: torch.Size, ranks: int) -> int:
    return zero3.region_on(shape, 0, ranks).numel


# -- dtypes ------------------------------------------------------------------------------------------------------------


def _dtypes(precision: PrecisionName) -> Dtypes:
    half = _HALF.get(precision)
    if precision.endswith("-mixed"):
        return Dtypes(None, autocast=half)
    return Dtypes(torch.float64 if precision == "64-true" else half)


def _fsdp_dtypes(precision: PrecisionName) -> Dtypes:
    half = _HALF.get(precision)
    return Dtypes(None if precision.endswith("-mixed") else half or torch.float32, computed=half)


def _deepspeed_dtypes(precision: PrecisionName) -> Dtypes:
    return Dtypes(_HALF.get(precision), masters=torch.float32)  # a second copy in fp32, too


# -- transient memory --------------------------------------------------------------------------------------------------


def _autocast_copies(step: Step) -> int:
    """Return the bytes of the weights that matrix products cast and keep for the backward pass."""
    if step.dtypes.autocast is None:
        return 0
    return step.nbytes([each for each in step.trained if len(each.shape) > 1], all_elements, step.dtypes.autocast)


def _ddp_transient(step: Step) -> int:
    buckets = step.nbytes(step.trained, all_elements) if step.ranks > 1 else 0
    return _autocast_copies(step) + buckets


def _fsdp_transient(step: Step) -> int:
    *inner, root = step.units
    largest = max(inner, default=Unit(0, 0))
    # one unit computes while the next is gathered and the gradients of the previous one are reduced
    within = root.weights + root.gradients + 2 * (largest.weights + largest.gradients)
    around = root.weights + max(root.weights, 2 * root.gradients)
    return _autocast_copies(step) + max(within, around)


def _reduce_bucket(step: Step) -> int:
    return _REDUCE_BUCKET * _largest_itemsize(step) if step.trained else 0


def _largest_itemsize(step: Step) -> int:
    return max((each.dtype.itemsize for each in step.parameters), default=0)


def _fp32_gradients(step: Step) -> int:
    return step.nbytes(step.trained, _equal_part, torch.float32)  # for the optimizer step


def _stage_1_transient(step: Step) -> int:
    return max(2 * _reduce_bucket(step) + step.nbytes(step.trained, all_elements), _fp32_gradients(step))


def _stage_2_transient(step: Step) -> int:
    return max(2 * _reduce_bucket(step), _fp32_gradients(step))  # one bucket fills while the other is sent


def _stage_3_transient(step: Step) -> int:
    live = min(step.nbytes(step.parameters, all_elements), _LIVE_PARAMETERS * _largest_itemsize(step))
    return _reduce_bucket(step) + max(live, _fp32_gradients(step))


# -- the strategies ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StrategyCosts:
    """How a strategy keeps and trains a model.

    Attributes:
        dtypes: the dtypes that it keeps, by precision.
        transient: the peak of what is allocated and freed within a step.
        kept: the part of a parameter that a rank keeps.
        updated: the part whose gradient and optimizer state a rank keeps.
        region: the region of a parameter that a rank reads, by shape, rank and number of ranks; ``None`` for all of it.
        sharded: a rank keeps only a part of each parameter.
        gathers: parameters are gathered in units.
        default_units: these units, unless the user names others.
        fills_units: the largest unit is unsharded while it is filled.
        single_rank: it runs on one rank only.
        shards_scalars: parameters without dimensions are supported.
        refused: precisions that Lightning refuses with it.
    """

    dtypes: Callable[[PrecisionName], Dtypes] = _dtypes
    transient: Callable[[Step], int] = _ddp_transient
    kept: Elements = all_elements
    updated: Elements = all_elements
    region: Callable[[torch.Size, int, int], Region] | None = None
    sharded: bool = False
    gathers: bool = False
    default_units: Units | None = None
    fills_units: bool = False
    single_rank: bool = False
    shards_scalars: bool = True
    refused: frozenset[PrecisionName] = frozenset()


_NO_DOUBLE: frozenset[PrecisionName] = frozenset({"64-true"})

STRATEGIES: Mapping[str, StrategyCosts] = {
    "single_device": StrategyCosts(single_rank=True),
    "ddp": StrategyCosts(),
    "fsdp": StrategyCosts(
        dtypes=_fsdp_dtypes,
        transient=_fsdp_transient,
        kept=_equal_part,
        updated=_equal_part,
        sharded=True,
        gathers=True,
        fills_units=True,
        refused=_NO_DOUBLE,
    ),
    "fsdp2": StrategyCosts(
        transient=_fsdp_transient,
        kept=_fsdp2_part,
        updated=_fsdp2_part,
        region=fsdp2.region_on,
        sharded=True,
        gathers=True,
        default_units="blocks",
        shards_scalars=False,
        refused=_NO_DOUBLE | {"16-mixed"},
    ),
    "deepspeed_stage_1": StrategyCosts(
        dtypes=_deepspeed_dtypes, transient=_stage_1_transient, updated=_equal_part, refused=_NO_DOUBLE
    ),
    "deepspeed_stage_2": StrategyCosts(
        dtypes=_deepspeed_dtypes, transient=_stage_2_transient, updated=_equal_part, refused=_NO_DOUBLE
    ),
    "deepspeed_stage_3": StrategyCosts(
        dtypes=_deepspeed_dtypes,
        transient=_stage_3_transient,
        kept=_zero3_part,
        updated=_zero3_part,
        region=zero3.region_on,
        sharded=True,
        refused=_NO_DOUBLE,
    ),
}
"""The strategies that can be forecast, by their names in Lightning."""
