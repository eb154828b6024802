"""The layout of DeepSpeed's files: where each tensor lies in the flat vectors of the ranks.

``*_model_states.pt`` has the module's state dict in the dtype it trained in, and what its tensors are:
``param_shapes`` (the trainable ones, a dict an optimizer group, in the order they are flattened),
``frozen_param_shapes`` and ``frozen_param_fragments``, ``shared_params`` (tied names). ``*_optim_states.pt``, one a
rank, has that rank's part of the fp32 masters, a vector a group. With ZeRO-1 and 2 the ranks' vectors of one group make
one long one, tensors end to end. With ZeRO-3 each tensor is cut into as many equal parts as there are ranks, the last
one padded, and a rank's vectors hold its parts of all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from fabric_init.checkpoints.formats.deepspeed.flat_shards import FlatShards
from fabric_init.checkpoints.formats.torch_save.meta_tensors import Storages
from fabric_init.checkpoints.region import is_below

_VECTORS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def locate(
    states: Sequence[Mapping[Any, Any]], optimizers: Sequence[Mapping[Any, Any]], storages: Storages
) -> tuple[int, dict[str, torch.Tensor | FlatShards]]:
    """Return the ZeRO stage, and the tensor or the shards of each trainable, frozen or tied parameter.

    Args:
        states: what the files ``*_model_states.pt`` hold, by rank (one for stages 1 and 2).
        optimizers: ``optimizer_state_dict`` of every rank.
        storages: knows which tensors have values.

    Raises:
        ValueError: they do not fit together, or are not what DeepSpeed writes.
    """
    stage = optimizers[0].get("zero_stage")
    if (
        not isinstance(stage, int)
        or stage not in _VECTORS
        or any(state.get("zero_stage") != stage for state in optimizers)
    ):
        raise ValueError(f"the ranks' zero_stage is {[state.get('zero_stage') for state in optimizers][:8]}")
    counts = optimizers[0].get("partition_count")
    ranks = max(counts) if isinstance(counts, list) and counts else counts
    if ranks != len(optimizers):
        raise ValueError(f"it was saved by {ranks} ranks, and {len(optimizers)} files *_optim_states.pt are there")
    vectors = [
        [_vector(value, storages) for value in _list(optimizer.get(_VECTORS[stage]))] for optimizer in optimizers
    ]
    groups = parameter_shapes(states[0])
    parameters: dict[str, torch.Tensor | FlatShards] = {}
    parameters.update(_frozen(states, ranks if stage == 3 else 1, storages))
    if stage == 3:
        parameters.update(_equal_parts(groups, vectors))
    else:
        parameters.update(_end_to_end(groups, vectors, optimizers[0].get("param_alignment_paddings")))
    for name, other in _dict(states[0].get("shared_params"), "shared_params").items():
        if isinstance(name, str) and isinstance(other, str) and other in parameters:
            parameters[name] = parameters[other]
    return stage, parameters


def parameter_shapes(state: Mapping[Any, Any]) -> list[dict[str, torch.Size]]:
    """Return the shapes of the trained parameters by name, one dict a parameter group, as one rank's states have them.

    Raises:
        ValueError: there are none, or something else is in their place.
    """
    return [_shapes(group, "param_shapes") for group in _list(state.get("param_shapes"))]


def _end_to_end(
    groups: list[dict[str, torch.Size]], vectors: list[list[torch.Tensor]], paddings: object
) -> Iterator[tuple[str, FlatShards]]:
    if any(len(of_rank) != len(groups) for of_rank in vectors):
        raise ValueError(f"{len(groups)} groups of parameters, {[len(of_rank) for of_rank in vectors][:8]} vectors")
    for index, shapes in enumerate(groups):
        parts = [of_rank[index] for of_rank in vectors]
        # DeepSpeed may start each tensor at a multiple of some bytes; how much it skips after each is saved.
        skips = [0] * len(shapes) if paddings is None else _list(_list(paddings)[index])
        at = 0
        for (name, shape), skip in zip(shapes.items(), skips, strict=True):
            if type(skip) is not int or skip < 0:
                raise ValueError(f"the padding after {name!r} is {skip!r:.80}")
            yield name, _shards(name, shape, _cut(parts, at, at + math.prod(shape)))
            at += math.prod(shape) + skip
        # The vector ends in padding to a multiple of twice the ranks, which most versions do not save.
        unit, length = 2 * len(vectors), sum(map(len, parts))
        if -(-at // unit) != -(-length // unit):
            raise ValueError(f"group {index} has parameters of {at:,} elements, and masters of {length:,}")


def _equal_parts(
    groups: list[dict[str, torch.Size]], vectors: list[list[torch.Tensor]]
) -> Iterator[tuple[str, FlatShards]]:
    at = 0
    for name, shape in chain.from_iterable(group.items() for group in groups):
        share = -(-math.prod(shape) // len(vectors))
        parts = chain.from_iterable(_cut(of_rank, at, at + share) for of_rank in vectors)
        yield name, _shards(name, shape, list(parts))
        at += share
    for rank, of_rank in enumerate(vectors):
        if sum(map(len, of_rank)) != at:
            raise ValueError(f"rank {rank} should hold {at:,} elements of masters, and has {sum(map(len, of_rank)):,}")


def _frozen(
    states: Sequence[Mapping[Any, Any]], ranks: int, storages: Storages
) -> Iterator[tuple[str, torch.Tensor | FlatShards]]:
    for name, shape in _shapes(states[0].get("frozen_param_shapes"), "frozen_param_shapes").items():
        held = [_dict(state.get("frozen_param_fragments"), "frozen_param_fragments") for state in states[:ranks]]
        if len(held) < ranks or not all(name in fragments for fragments in held):
            raise ValueError(f"the frozen parameter {name!r} lacks the parts of some ranks")
        if ranks == 1 and isinstance(held[0][name], torch.Tensor) and held[0][name].shape == shape:
            yield name, _with_values(held[0][name], storages)
        else:
            yield name, _shards(name, shape, [_vector(fragments[name], storages) for fragments in held])


def _cut(vectors: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Return elements ``start:stop`` of the vectors laid end to end; fewer where they end earlier."""
    parts, first = [], 0
    for vector in vectors:
        low, high = max(start, first), min(stop, first + len(vector))
        if low < high:
            parts.append(vector[low - first : high - first])
        first += len(vector)
    return parts or [vector[:0] for vector in vectors[:1]]


def _shards(name: str, shape: torch.Size, parts: list[torch.Tensor]) -> FlatShards:
    try:
        return FlatShards(shape, parts)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _vector(value: object, storages: Storages) -> torch.Tensor:
    vector = _with_values(value, storages)
    if vector.dim() != 1 or vector.shape[0] < 0 or not vector.is_contiguous():
        raise ValueError(f"a part of the parameters has the shape {tuple(vector.shape)}, and is no vector")
    return vector


def _with_values(value: object, storages: Storages) -> torch.Tensor:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    if not plain or not isinstance(value, torch.Tensor) or not storages.holds(value):
        raise ValueError(f"a part of the parameters is a {type(value).__name__}, not a tensor with values")
    if not storages.reaches(value):
        raise ValueError(f"a part of the parameters, of shape {tuple(value.shape)}, is larger than its storage")
    return value.detach()


def _shapes(value: object, what: str) -> dict[str, torch.Size]:
    shapes = {}
    for name, shape in _dict(value, what).items():
        if not isinstance(name, str) or not isinstance(shape, (tuple, list)):
            raise ValueError(f"{what} should be a dict of name -> shape, and has {name!r:.80} -> {shape!r:.80}")
        if not all(type(size) is int and 0 <= size < 2**62 for size in shape) or not is_below(2**62, shape):
            raise ValueError(f"{name!r} has the shape {tuple(shape)!r:.80}")
        shapes[name] = torch.Size(shape)
    return shapes


def _dict(value: object, what: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} should be a dict, and is a {type(value).__name__}")
    return value


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected one list per parameter group, got {type(value).__name__}")
    return value
