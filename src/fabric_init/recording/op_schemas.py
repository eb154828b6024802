"""Facts about operators that recording and replay both need, read off their schemas and looked up once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tag
from torch._ops import OpOverload

Func = Callable[..., Any]

INIT_FUNCTIONS: dict[str, Func] = {
    name: getattr(torch.nn.init, name)
    for name in (
        "uniform_",
        "normal_",
        "trunc_normal_",
        "constant_",
        "ones_",
        "zeros_",
        "eye_",
        "dirac_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "orthogonal_",
        "sparse_",
    )
}
"""The functions of ``torch.nn.init`` that fill a tensor. Each is recorded as one call."""

DRAWS_FROM_DEFAULT = frozenset({"sparse_"})
"""Init functions that draw from torch's default generator even when they are given one (torch 2.13)."""

_FIXED_INIT = frozenset({"constant_", "ones_", "zeros_", "eye_", "dirac_"})

# In-place ops whose target's old value does not matter.
_OVERWRITING = frozenset(
    {
        "aten::fill_",
        "aten::zero_",
        "aten::copy_",
        "aten::uniform_",
        "aten::normal_",
        "aten::log_normal_",
        "aten::cauchy_",
        "aten::exponential_",
        "aten::geometric_",
        "aten::random_",
        "aten::bernoulli_",
    }
)

# Factories that promise no values: they make a storage and write nothing.
_UNFILLED = frozenset(
    {
        "aten::empty",
        "aten::empty_strided",
        "aten::empty_permuted",
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)


# Factories whose result is contiguous, of the size that is their first argument, in the dtype asked for or the default
# one: no need to ask the meta kernel, which is Python and slow.
PLAIN_FACTORIES = frozenset({"aten::ones", "aten::zeros", "aten::rand", "aten::randn"})


_COPIES = frozenset({"aten::clone", "aten::copy_", "aten::_to_copy"})

# Factories that look at a tensor's shape, dtype and device, but at none of its values.
_SHAPE_ONLY = frozenset(
    {f"aten::{name}_like" for name in ("zeros", "ones", "full", "rand", "randn", "randint")}
    | {f"aten::new_{name}" for name in ("zeros", "ones", "full")}
)


# Written, though the schemas do not say so.
_WRITTEN_UNSAID = {
    name: ((3, "running_mean"), (4, "running_var"))
    for name in ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
}


# Select elements by an index: what comes out of a tensor that waits may wait as well, whatever the index is.
INDEXES = frozenset(
    {f"aten::{name}" for name in ("index", "index_select", "gather", "take", "take_along_dim", "_unsafe_index")}
)


class Traits(NamedTuple):
    """What an aten operator does, as far as recording cares."""

    name: str
    written: tuple[tuple[int, str], ...]  # (position, name) of the arguments that it writes
    has_device: bool
    takes_generator: bool
    takes_dtype: bool
    unfilled: bool
    plain_fill: bool  # writes its first argument and needs no shape check: the meta kernel need not run
    random: bool
    data_dependent: bool
    changes_geometry: bool
    pointwise: bool


@cache
def traits(func: OpOverload) -> Traits:
    schema = func._schema
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    written += _WRITTEN_UNSAID.get(schema.name, ())
    tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)
    return Traits(
        name=schema.name,
        written=written,
        has_device=any(argument.name == "device" for argument in schema.arguments),
        takes_generator=any(argument.name == "generator" for argument in schema.arguments),
        takes_dtype=any(argument.name == "dtype" for argument in schema.arguments),
        unfilled=schema.name in _UNFILLED,
        plain_fill=schema.name in _OVERWRITING and tensors == 1,
        random=Tag.nondeterministic_seeded in func.tags,
        data_dependent=bool({Tag.data_dependent_output, Tag.dynamic_output_shape} & set(func.tags)),
        changes_geometry=Tag.inplace_view in func.tags,
        pointwise=Tag.pointwise in func.tags and not written and len(schema.returns) == 1,
    )


@cache
def overwrites(func: Func) -> bool:
    """Whether the tensors that ``func`` writes in place get values that do not depend on their old ones."""
    if not isinstance(func, OpOverload):
        return True  # an init function
    schema = func._schema
    return schema.name in _OVERWRITING or any(argument.is_out for argument in schema.arguments)


@cache
def pointwise(func: Func) -> bool:
    """Whether each element that ``func`` gives depends on the same element of what it reads."""
    return isinstance(func, OpOverload) and Tag.pointwise in func.tags


@cache
def is_cast(func: Func) -> bool:
    """Whether ``func`` makes a new tensor of another dtype, device or memory layout."""
    return isinstance(func, OpOverload) and func._schema.name == "aten::_to_copy"


@cache
def only_copies(func: Func) -> bool:
    """Whether ``func`` gives the values of what it reads, as they are or cast."""
    return isinstance(func, OpOverload) and func._schema.name in _COPIES


@cache
def asks_shape_only(func: Func) -> bool:
    """Whether ``func`` takes tensors without needing their values."""
    return isinstance(func, OpOverload) and func._schema.name in _SHAPE_ONLY


@cache
def written_arguments(func: Func) -> tuple[frozenset[int], frozenset[str]]:
    """The positions and the names of the arguments that ``func`` writes in place."""
    if not isinstance(func, OpOverload):
        return frozenset({0}), frozenset({"tensor"})
    written = traits(func).written
    return frozenset(position for position, _ in written), frozenset(name for _, name in written)


@cache
def is_random(func: Func) -> bool:
    """Whether ``func`` draws random numbers."""
    if isinstance(func, OpOverload):
        return traits(func).random
    return func.__name__ not in _FIXED_INIT


@cache
def with_generator(func: Func) -> Func | None:
    """``func``, or the overload of it, that takes a ``generator``; ``None`` if there is none."""
    if not isinstance(func, OpOverload):
        return None if func.__name__ in DRAWS_FROM_DEFAULT else func
    names = [argument.name for argument in func._schema.arguments]
    if "generator" in names:
        return func
    packet = func.overloadpacket
    for overload in packet.overloads():
        other: OpOverload = getattr(packet, overload)
        if [a.name for a in other._schema.arguments if a.name != "generator"] == names and any(
            a.name == "generator" for a in other._schema.arguments
        ):
            return other
    return None
