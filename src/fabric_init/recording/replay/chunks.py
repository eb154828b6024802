"""Compute large tensors in chunks: by several threads, and by each rank no more than it keeps.

[Note: chunks]
An init gives each element a value that does not depend on its neighbors. With ``rng="per_op"`` a draw of more than
:data:`CHUNK` elements therefore takes the numbers of each chunk from a generator of its own (``tape/seeds.py``). Which
chunks are computed, where, and in which order makes no difference, so one seed gives one model on any number of ranks,
and each rank draws what it keeps alone.

All elements of a chunk are always computed together, in row-major order, and only with operations that round each
result once. A kernel may treat the last few elements of its input in another way than the others (those that do not
fill a vector register), and what it approximates, such as ``exp``, could differ there in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from fabric_init._torch_internals import OpOverload
from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.op_properties import traits, with_generator
from fabric_init.recording.tape.seeds import chunk_seed
from fabric_init.recording.tape.tape import Constant, Draw, Op, Tape, TensorRef

CHUNK = 1 << 17
"""The number of elements of one chunk. The random values of larger tensors depend on it."""

Fill = Callable[..., Any]
"""Writes all elements of the tensor that it is called with. Takes a ``generator=`` if its op draws."""


def chunks_of(numel: int) -> Iterator[tuple[int, int]]:
    """Yield the first element of each chunk of ``numel`` elements, and the one behind its last."""
    for start in range(0, numel, CHUNK):
        yield start, min(numel, start + CHUNK)


# -- draws -------------------------------------------------------------------------------------------------------------

_OF_ANY_SHAPE = frozenset({"uniform_", "normal_", "trunc_normal_", "constant_", "ones_", "zeros_"})
_OF_FANS = frozenset({"xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"})
_FACTORIES: dict[str, Fill] = {
    "aten::rand": torch.Tensor.uniform_,
    "aten::randn": torch.Tensor.normal_,
    "aten::zeros": torch.Tensor.zero_,
    "aten::ones": lambda tensor: tensor.fill_(1),
}
_SETS = ("aten::copy_", "aten::fill_")


class _Probe(torch.Tensor):
    """A tensor of the shape that an init function gets: shows how it is filled once the fans are known."""

    call: tuple[str, tuple[Any, ...]] | None = None

    def uniform_(self, *args: Any, generator: Any = None) -> _Probe:
        return self._note("uniform_", args)

    def normal_(self, *args: Any, generator: Any = None) -> _Probe:
        return self._note("normal_", args)

    def _note(self, name: str, args: tuple[Any, ...]) -> _Probe:
        assert self.call is None, "an init function that depends on fans draws once"
        self.call = name, args
        return self


def fill_of(op: Op) -> tuple[TensorRef, Fill] | None:
    """Return what ``op`` fills, and how to fill any part of it; ``None`` if it does more, or has to see all of it."""
    if not isinstance(op.func, OpOverload):
        return _fill_of_init(op)
    if (factory := _FACTORIES.get(traits(op.func).name)) is not None and len(op.outputs) == 1:
        return op.outputs[0], factory
    if traits(op.func).name in _SETS and isinstance(op.args[1], Constant) and op.args[1].tensor.dim() == 0:
        return op.args[0], partial(_set_to, op.args[1].tensor)
    if not traits(op.func).plain_fill or not op.args or not isinstance(op.args[0], TensorRef):
        return None
    func = (with_generator(op.func) or op.func) if op.draw is not None else op.func
    rest, kwargs = op.args[1:], {name: value for name, value in op.kwargs.items() if name != "generator"}
    return op.args[0], lambda tensor, **generator: func(tensor, *rest, **kwargs, **generator)


def _set_to(number: torch.Tensor, tensor: torch.Tensor) -> None:
    tensor.copy_(number)


def _fill_of_init(op: Op) -> tuple[TensorRef, Fill] | None:
    name = op.func.__name__
    kwargs = {name: value for name, value in op.kwargs.items() if name not in ("generator", "tensor")}
    ref, rest = (op.args[0], op.args[1:]) if op.args else (op.kwargs["tensor"], ())
    if name in _OF_ANY_SHAPE:
        return ref, lambda tensor, **generator: op.func(tensor, *rest, **kwargs, **generator)
    if name in _OF_FANS:
        probe = torch.empty(ref.size, dtype=ref.dtype, device="meta").as_subclass(_Probe)
        op.func(probe, *rest, **kwargs)
        if probe.call is not None:
            method, args = probe.call
            return ref, lambda tensor, **generator: getattr(tensor, method)(*args, **generator)
    return None


class ChunkedDraw(NamedTuple):
    """A draw of more than one chunk."""

    ref: TensorRef
    fill: Fill
    seed: Callable[[int], int]

    def chunk(self, start: int, out: torch.Tensor) -> None:
        """Draw the chunk that begins at element ``start`` into ``out``, which is 1-D."""
        self.fill(out, generator=torch.Generator(out.device).manual_seed(self.seed(start // CHUNK)))


def chunked_draw(tape: Tape, op: Op, *, exact: bool) -> ChunkedDraw | None:
    """Return how ``op`` draws chunk by chunk; ``None`` if it does not draw, or all at once."""
    if op.draw is None or exact or not any(ref.size.numel() > CHUNK for ref in (*op.targets, *op.outputs)):
        return None
    found = fill_of(op)
    return None if found is None else _in_chunks(tape, op.draw, *found)


def _in_chunks(tape: Tape, draw: Draw, ref: TensorRef, fill: Fill) -> ChunkedDraw | None:
    stream = tape.streams[draw.stream]
    if stream.exact or ref.size.numel() <= CHUNK or not ref.row_major or ref.conj or ref.neg:
        return None
    return ChunkedDraw(ref, fill, partial(chunk_seed, stream.seed, draw.position))


# -- all ops on which a storage depends --------------------------------------------------------------------------------

_ROUNDED_ONCE = frozenset(
    f"aten::{name}{in_place}"
    for name in ("mul", "div", "add", "sub", "rsub", "neg", "abs", "clamp", "clamp_min", "clamp_max", "sqrt", "copy")
    for in_place in ("", "_")
) | {"aten::clone", "aten::_to_copy"}


class _Step(NamedTuple):
    """One op, on one chunk: its arguments have the numbers of storages, as :class:`_On`, in place of references."""

    func: Fill
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int | None  # the storage that it makes
    dtype: torch.dtype | None
    draw: ChunkedDraw | None
    within: tuple[int, int] | None  # the elements that it writes, if not all

    def fill(self, start: int, chunk: torch.Tensor) -> None:
        """Fill what it does of the ``chunk`` that begins at element ``start``."""
        if self.draw is not None:
            self.draw.chunk(start, chunk)
        elif self.within is None:
            self.func(chunk)
        else:
            first, last = (min(max(at - start, 0), len(chunk)) for at in self.within)
            if first < last:
                self.func(chunk[first:last])


class _On(NamedTuple):
    storage: int


class Chunks(NamedTuple):
    """How any chunk of a storage is computed, from nothing but the tape."""

    numel: int
    dtype: torch.dtype
    storage: int
    steps: tuple[_Step, ...]

    def compute(self, start: int, out: torch.Tensor) -> None:
        """Compute the chunk that begins at element ``start`` into ``out``, which is 1-D and as long."""
        made: dict[int, torch.Tensor] = {}
        for step in self.steps:
            if step.draw is not None or step.dtype is not None:  # a fill
                assert step.result is not None
                if step.result not in made:
                    mine = step.result == self.storage
                    made[step.result] = out if mine else torch.empty(len(out), dtype=step.dtype, device=out.device)
                step.fill(start, made[step.result])
                continue
            args = tuple(made[arg.storage] if isinstance(arg, _On) else arg for arg in step.args)
            result = step.func(*args, **_on_device(step.kwargs, out.device))
            if step.result == self.storage:
                made[self.storage] = out.copy_(result)
            elif step.result is not None:
                made[step.result] = result


def _on_device(kwargs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {**kwargs, "device": device} if "device" in kwargs else kwargs


def chunks(tape: Tape, ref: TensorRef, *, exact: bool) -> Chunks | None:
    """Return how to compute the tensor ``ref`` chunk by chunk.

    Args:
        tape: The recording.
        ref: A tensor that spans its storage.
        exact: As in :func:`~fabric_init.recording.replay.replay.replay`.

    Returns:
        ``None`` if it is not more than one chunk, or if its elements depend on one another, on their place, or on
        numbers that have to be drawn in order.
    """
    numel = ref.size.numel()
    if exact or numel <= CHUNK or not _spans(tape, ref, numel):
        return None
    live = [tape.ops[number] for number in sorted(live_ops(tape, [ref.storage], exact=False))]
    if len(live) == 1 and isinstance(live[0].func, OpOverload) and traits(live[0].func).name == "aten::zeros":
        return None  # takes no physical memory before somebody writes to it
    steps: list[_Step] = []
    dtypes: dict[int, torch.dtype] = {}
    written: set[int] = set()
    for op in live:
        if any(dtypes.setdefault(each.storage, each.dtype) != each.dtype for each in (*op.refs(), *op.outputs)):
            return None
        step = _step(tape, op, ref)
        if step is None or any(each.storage not in written for each in op.reads()):
            return None
        if step.result is not None and step.within is None:
            written.add(step.result)
        elif step.within is not None and step.result not in written:
            return None
        steps.append(step)
    return Chunks(numel, ref.dtype, ref.storage, tuple(steps)) if ref.storage in written else None


def _spans(tape: Tape, ref: TensorRef, numel: int) -> bool:
    whole = ref.offset == 0 and ref.row_major and ref.size.numel() == numel and not (ref.conj or ref.neg)
    return whole and ref.nbytes == tape.storages[ref.storage].nbytes


def _step(tape: Tape, op: Op, like: TensorRef) -> _Step | None:
    """Return ``op`` on one chunk of tensors that are ``like`` the wanted one; ``None`` if there is no such thing."""
    found = fill_of(op)
    return _pointwise_step(tape, op, like) if found is None else _fill_step(tape, op, like, *found)


def _fill_step(tape: Tape, op: Op, like: TensorRef, ref: TensorRef, fill: Fill) -> _Step | None:
    numel = like.size.numel()
    draw = None if op.draw is None else _in_chunks(tape, op.draw, ref, fill)
    if _spans(tape, ref, numel):
        return None if op.draw is not None and draw is None else _Step(fill, (), {}, ref.storage, ref.dtype, draw, None)
    if op.draw is not None or not ref.row_major or not _is_part(tape, ref, numel):
        return None
    return _Step(fill, (), {}, ref.storage, ref.dtype, None, (ref.offset, ref.offset + ref.size.numel()))


def _pointwise_step(tape: Tape, op: Op, like: TensorRef) -> _Step | None:
    if not isinstance(op.func, OpOverload) or traits(op.func).name not in _ROUNDED_ONCE or op.default_dtype is not None:
        return None
    numel = like.size.numel()
    if any(ref.size != like.size or not _spans(tape, ref, numel) for ref in (*op.refs(), *op.outputs)):
        return None
    positional_alpha = len(op.args) > 2 and "sub" in traits(op.func).name
    if positional_alpha or op.kwargs.get("alpha", 1) != 1 or op.kwargs.get("memory_format") not in _SAME_LAYOUT:
        return None
    args = tuple(_On(arg.storage) if isinstance(arg, TensorRef) else arg for arg in op.args)
    if not all(isinstance(value, (_On, *_NO_TENSOR)) for value in (*args, *op.kwargs.values())):
        return None
    return _Step(op.func, args, dict(op.kwargs), op.outputs[0].storage if op.outputs else None, None, None, None)


_SAME_LAYOUT = (None, torch.preserve_format, torch.contiguous_format)
_NO_TENSOR = (int, float, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _is_part(tape: Tape, ref: TensorRef, numel: int) -> bool:
    """Return whether ``ref`` is on consecutive elements of a storage with ``numel`` of them."""
    return tape.storages[ref.storage].nbytes == numel * ref.dtype.itemsize
