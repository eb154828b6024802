"""Properties of operators that recording and replay need, derived from their schemas and cached."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tag

from fabric_init._torch_internals import COMPOSITE_KEY, OpOverload

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
"""Init functions that draw from torch's default generator even if called with ``generator=`` (torch 2.13)."""

_FIXED_INIT = frozenset({"constant_", "ones_", "zeros_", "eye_", "dirac_"})

# In-place ops whose result does not depend on the target's old values.
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

# Factories of uninitialized memory: they write nothing, so they are not recorded as ops.
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


# Factories whose result is contiguous, with their first argument as its size and the requested or default dtype. For
# these the recorder skips the meta kernel, which is Python and slow.
PLAIN_FACTORIES = frozenset({"aten::ones", "aten::zeros", "aten::rand", "aten::randn"})


_CHANGE_STORAGE = frozenset({"aten::resize_", "aten::resize_as_", "aten::set_"})

_COPIES = frozenset({"aten::clone", "aten::copy_", "aten::_to_copy"})

_PRODUCTS = frozenset({"mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "addmv", "linear"})
_LINEAR_ALGEBRA = ("linalg_", "_linalg_", "geqrf", "ormqr", "cholesky", "triangular_solve", "lu_", "_fft_")

# Factories that read a tensor's shape, dtype and device, but not its values.
_SHAPE_ONLY = frozenset(
    {f"aten::{name}_like" for name in ("zeros", "ones", "full", "rand", "randn", "randint")}
    | {f"aten::new_{name}" for name in ("zeros", "ones", "full")}
)


# Arguments that these ops write although their schemas do not mark them.
_WRITTEN_UNMARKED = {
    name: ((3, "running_mean"), (4, "running_var"))
    for name in ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")
}


# Select elements by an index: what comes out of a tensor that waits may wait as well, whatever the index is.
INDEXES = frozenset(
    {f"aten::{name}" for name in ("index", "index_select", "gather", "take", "take_along_dim", "_unsafe_index")}
)


class Traits(NamedTuple):
    """The properties of an aten operator that recording depends on."""

    name: str
    written: tuple[tuple[int, str], ...]  # (position, name) of the arguments that it writes
    training: int | None  # the position of a flag without which it writes nothing (batch norm)
    has_device: bool
    takes_generator: bool
    takes_dtype: bool
    unfilled: bool
    plain_fill: bool  # overwrites its only tensor argument: no shape to compute, so no meta kernel to run
    random: bool
    data_dependent: bool
    changes_geometry: bool
    view_in_place: bool  # changes nothing else
    quantizes: bool  # returns a quantized tensor, which its meta kernel does not
    pointwise: bool
    view: bool  # returns nothing but views of its first argument, and takes no other tensor


@cache
def traits(func: OpOverload) -> Traits:
    """Return the properties of ``func``."""
    schema = func._schema
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    written += _WRITTEN_UNMARKED.get(schema.name, ())
    tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)
    return Traits(
        name=schema.name,
        written=written,
        training=next((i for i, argument in enumerate(schema.arguments) if argument.name == "training"), None),
        has_device=any(argument.name == "device" for argument in schema.arguments),
        takes_generator=any(argument.name == "generator" for argument in schema.arguments),
        takes_dtype=any(argument.name == "dtype" for argument in schema.arguments),
        unfilled=schema.name in _UNFILLED,
        plain_fill=schema.name in _OVERWRITING and tensors == 1,
        random=Tag.nondeterministic_seeded in func.tags,
        data_dependent=bool({Tag.data_dependent_output, Tag.dynamic_output_shape} & set(func.tags)),
        changes_geometry=Tag.inplace_view in func.tags,
        quantizes=schema.name.startswith("aten::quantize_per_"),
        view_in_place=Tag.inplace_view in func.tags and schema.name not in _CHANGE_STORAGE,
        pointwise=Tag.pointwise in func.tags and not written and len(schema.returns) == 1,
        view=tensors == 1 and not written and _is_view(func),
    )


def _is_view(func: OpOverload) -> bool:
    """Return whether ``func`` always returns views; composite ones, such as ``to`` and ``reshape``, may copy."""
    return func.is_view and not func.has_kernel_for_dispatch_key(COMPOSITE_KEY)


@cache
def overwrites(func: Func) -> bool:
    """Return whether the tensors that ``func`` writes in place get values independent of their old ones."""
    if not isinstance(func, OpOverload):
        return True  # an init function
    schema = func._schema
    return schema.name in _OVERWRITING or any(argument.is_out for argument in schema.arguments)


@cache
def has_out(func: Func) -> bool:
    """Return whether ``func`` writes its result to tensors that it is given as ``out=``, and may change their shape."""
    return isinstance(func, OpOverload) and any(argument.is_out for argument in func._schema.arguments)


@cache
def pointwise(func: Func) -> bool:
    """Return whether each element of ``func``'s result depends only on the same element of its inputs."""
    return isinstance(func, OpOverload) and Tag.pointwise in func.tags


@cache
def only_copies(func: Func) -> bool:
    """Return whether ``func`` copies the values that it reads, possibly with a cast."""
    return isinstance(func, OpOverload) and func._schema.name in _COPIES


@cache
def mixes(func: Func) -> bool:
    """Return whether each element of ``func``'s result depends on many of its inputs' by linear algebra."""
    if not isinstance(func, OpOverload):
        return False
    name = func._schema.name.removeprefix("aten::")
    return name in _PRODUCTS or (name.startswith(_LINEAR_ALGEBRA) and name != "linalg_vector_norm")


@cache
def asks_shape_only(func: Func) -> bool:
    """Return whether ``func`` reads only the metadata of its tensors, not their values."""
    return isinstance(func, OpOverload) and func._schema.name in _SHAPE_ONLY


@cache
def written_arguments(func: Func) -> tuple[frozenset[int], frozenset[str]]:
    """Return the positions and the names of the arguments that ``func`` writes in place."""
    if not isinstance(func, OpOverload):
        return frozenset({0}), frozenset({"tensor"})
    written = traits(func).written
    return frozenset(position for position, _ in written), frozenset(name for _, name in written)


@cache
def is_random(func: Func) -> bool:
    """Return whether ``func`` draws random numbers."""
    if isinstance(func, OpOverload):
        return traits(func).random
    return func.__name__ not in _FIXED_INIT


@cache
def with_generator(func: Func) -> Func | None:
    """Return ``func`` or its overload that takes a ``generator``, or ``None`` if there is none."""
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
