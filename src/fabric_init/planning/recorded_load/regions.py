"""Which parts of which sources a region of a recorded tensor needs, and the region's values from those.

[Note: regions through ops]
A view needs no op: it is a window (offset, sizes, strides) on the storage of another tensor. So slices, ``chunk``,
``split``, ``view``, ``permute`` and ``transpose`` lead to a box of what was written to that storage. The ops that wrote
it either put tensors side by side (``cat``, ``stack``), or compute each element from the same element of others
(``clone``, casts, ``copy_``, arithmetic): a box of the result needs boxes of the arguments. Any other op is computed
whole, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fabric_init.checkpoints.reader import read
from fabric_init.checkpoints.region import Box, Region, Span, full_box, span_of_boxes, take, window
from fabric_init.planning.recorded_load.key_tensors import KeyTensor, source_read_by
from fabric_init.recording.replay.replay import real_execution, run_ops, view
from fabric_init.recording.tape.liveness import covers, live_ops
from fabric_init.recording.tape.op_properties import only_copies, pointwise
from fabric_init.recording.tape.tape import Constant, Op, Tape, TensorRef

_CPU = torch.device("cpu")
_COPIES = ("aten::clone", "aten::_to_copy")
_READ_AT_ONCE = 1 << 20  # bytes; what is larger and freed between tensors that stay leaves holes in the heap
_KEPT = 4  # results that were computed whole: parts of one are mostly read one after the other


class Evaluation:
    """Values of tensors on one tape, region by region.

    Args:
        tape: The tape; ops that come to it later are not looked at.
        whole: Whether every source is read whole, in the same order, whatever the region is: reading is for all ranks
            together.
    """

    def __init__(self, tape: Tape, *, whole: bool = False) -> None:
        self._tape = tape
        self._whole = whole
        self._computed: dict[tuple[int, int], torch.UntypedStorage] = {}  # what has been computed whole

    def region(self, ref: TensorRef, region: Region | None) -> Tensor:
        """Return a region of the tensor ``ref``, on the CPU."""
        with real_execution():
            if self._whole:
                return take(view(self._storage(ref.storage, None), ref), region).clone()
            size = tuple(ref.size)
            if isinstance(region, Span):
                return span_of_boxes(size, region, ref.dtype, lambda box: self._box(ref, box, None))
            return self._box(ref, region or full_box(size), None)

    def _box(self, ref: TensorRef, box: Box, before: int | None) -> Tensor:
        if not box.numel:
            return torch.empty(box.sizes, dtype=ref.dtype)
        offset = ref.offset + sum(start * stride for start, stride in zip(box.offsets, ref.stride, strict=True))
        op = _last_writer(self._tape, ref.storage, before)
        written = None if op is None else _written_by(op, ref.storage)
        if op is None or written is None or ref.conj or ref.neg or written.dtype != ref.dtype:
            return self._computed_box(ref, box, before)
        if not covers(self._tape, written) or written.offset or not written.row_major:
            return self._computed_box(ref, box, before)
        make = self._way(op, written)
        if make is None:
            return self._computed_box(ref, box, before)
        needed, steps = _box_of_window(tuple(written.size), offset, box.sizes, ref.stride)
        values = make(needed)
        if steps is None:  # whole rows, in which the elements lie as in the storage
            values = values.contiguous()
            start = offset - needed.offsets[0] * window(tuple(written.size), None).strides[0]
            return values.as_strided(box.sizes, ref.stride, values.storage_offset() + start)
        strides = [sum(map(math.prod, zip(mine, values.stride(), strict=True))) for mine in steps]
        return values.as_strided(box.sizes, strides, values.storage_offset())

    def _way(self, op: Op, written: TensorRef) -> Callable[[Box], Tensor] | None:
        """Return how to compute a box of what ``op`` writes from boxes of its arguments, if that is known."""
        func, before = op.func, op.number
        origin = source_read_by(op)
        if origin is not None:
            return lambda box: read(origin.reader, origin.key, box)
        name = _name(func)
        if name in ("aten::cat", "aten::stack"):
            parts = op.args[0]
            dim = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
            if not all(isinstance(part, TensorRef) and part.dtype == written.dtype for part in parts):
                return None
            dim = dim % len(written.size)
            join = self._cat if name == "aten::cat" else self._stack
            return lambda box: join(parts, dim, box, written.dtype, before)
        source = op.args[1] if name == "aten::copy_" else op.args[0] if name in _COPIES else None
        if isinstance(source, (TensorRef, Constant)):
            return lambda box: self._argument(source, box, before).to(written.dtype).expand(box.sizes)
        if pointwise(func) and op.draw is None and len(op.outputs) + len(op.targets) == 1:
            return lambda box: self._pointwise(op, box)
        return None

    def _argument(self, value: TensorRef | Constant, box: Box, before: int) -> Tensor:
        """Return what of an argument, which is broadcast to the result, a box of the result needs."""
        if isinstance(value, Constant):
            size = tuple(value.tensor.shape)
            return take(value.tensor, _broadcast(box, size))
        return self._box(value, _broadcast(box, tuple(value.size)), before)

    def _pointwise(self, op: Op, box: Box) -> Tensor:
        def real(value: Any) -> Any:
            if isinstance(value, (TensorRef, Constant)):
                needed = self._argument(value, box, op.number)
                return needed.clone() if value in op.targets else needed
            return _CPU if isinstance(value, torch.device) else value

        result = op.func(*map(real, op.args), **{name: real(value) for name, value in op.kwargs.items()})
        assert isinstance(result, Tensor)
        return result

    def _cat(self, parts: tuple[TensorRef, ...], dim: int, box: Box, dtype: torch.dtype, before: int) -> Tensor:
        pieces: list[tuple[TensorRef, Box]] = []
        start, stop, at = box.offsets[dim], box.offsets[dim] + box.sizes[dim], 0
        for part in parts:
            if len(part.size) != len(box.sizes):  # torch skips empty tensors of one dimension
                continue
            low, high = max(start, at), min(stop, at + part.size[dim])
            if low < high:
                pieces.append((part, _along(box, dim, low - at, high - low)))
            at += part.size[dim]
        if len(pieces) == 1:
            return self._box(*pieces[0], before)
        out = torch.empty(box.sizes, dtype=dtype)
        at = 0
        for part, piece in pieces:
            self._copy_in(out.narrow(dim, at, piece.sizes[dim]), part, piece, before)
            at += piece.sizes[dim]
        return out

    def _stack(self, parts: tuple[TensorRef, ...], dim: int, box: Box, dtype: torch.dtype, before: int) -> Tensor:
        inner = Box(box.offsets[:dim] + box.offsets[dim + 1 :], box.sizes[:dim] + box.sizes[dim + 1 :])
        out = torch.empty(box.sizes, dtype=dtype)
        first = box.offsets[dim]
        for index, part in enumerate(parts[first : first + box.sizes[dim]]):
            self._copy_in(out.select(dim, index), part, inner, before)
        return out

    def _copy_in(self, out: Tensor, ref: TensorRef, box: Box, before: int) -> None:
        """Fill ``out`` with a box of a tensor, some rows at a time."""
        if out.nbytes <= _READ_AT_ONCE:
            out.copy_(self._box(ref, box, before))
            return
        rows = max(1, _READ_AT_ONCE // out[0].nbytes)
        for first in range(0, len(out), rows):
            some = out[first : first + rows]
            some.copy_(self._box(ref, _along(box, 0, box.offsets[0] + first, len(some)), before))

    # -- what is computed whole ----------------------------------------------------------------------------------------

    def _computed_box(self, ref: TensorRef, box: Box, before: int | None) -> Tensor:
        return take(view(self._storage(ref.storage, before), ref), box)

    def _storage(self, storage: int, before: int | None) -> torch.UntypedStorage:
        op = _last_writer(self._tape, storage, before)
        key = storage, -1 if op is None else op.number
        if key not in self._computed:
            while len(self._computed) >= _KEPT:
                del self._computed[next(iter(self._computed))]
            numbers = live_ops(self._tape, [storage], exact=self._tape.rng == "eager", before=before)
            self._computed[key] = run_ops(self._tape, numbers, storage, _CPU)
        return self._computed[key]


def sources_of(tape: Tape, ref: TensorRef) -> list[str]:
    """Return the checkpoint keys that the value of ``ref`` is computed from, in the order in which they were read."""
    live = sorted(live_ops(tape, [ref.storage], exact=False))
    return [source.key for number in live if (source := source_read_by(tape.ops[number])) is not None]


def copied_source(tape: Tape, ref: TensorRef) -> KeyTensor | None:
    """Return the source that ``ref`` is a plain copy of, but for its dtype; ``None`` if more was done."""
    dtypes = set()
    for copy, op in _copies(tape, ref):
        dtypes.add(copy.dtype)
        source = None if op is None else source_read_by(op)
        if op is not None and source is not None and _written_by(op, copy.storage) == copy:
            return source if dtypes <= {ref.dtype, copy.dtype} else None  # else a cast on the way may have rounded
    return None


def is_copy_of(tape: Tape, ref: TensorRef, number: int) -> bool:
    """Return whether ``ref`` is a plain copy of what op ``number`` has written."""
    return any(op is not None and op.number == number for _, op in _copies(tape, ref))


def _copies(tape: Tape, ref: TensorRef) -> Iterator[tuple[TensorRef, Op | None]]:
    """Yield ``ref``, what that is a copy of, and so on, each with the op that wrote it last."""
    before: int | None = None
    while True:
        op = _last_writer(tape, ref.storage, before)
        yield ref, op
        written = None if op is None else _written_by(op, ref.storage)
        if op is None or written is None or written[1:] != ref[1:] or not covers(tape, ref) or not only_copies(op.func):
            return
        source = op.args[1] if _name(op.func) == "aten::copy_" else op.args[0]
        if not isinstance(source, TensorRef) or source.size != ref.size:
            return
        ref, before = source, op.number


def _last_writer(tape: Tape, storage: int, before: int | None) -> Op | None:
    for number in reversed(tape.writers.get(storage, ())):
        if before is None or number < before:
            return tape.ops[number]
    return None


def _written_by(op: Op, storage: int) -> TensorRef | None:
    return next((ref for ref in (*op.outputs, *op.targets) if ref.storage == storage), None)


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return "" if schema is None else str(schema.name)


def _along(box: Box, dim: int, offset: int, size: int) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim], sizes[dim] = offset, size
    return Box(tuple(offsets), tuple(sizes))


def _broadcast(box: Box, size: tuple[int, ...]) -> Box:
    """Return the box of an argument of ``size`` that a box of the result needs."""
    skipped = len(box.sizes) - len(size)
    pairs = zip(box.offsets[skipped:], box.sizes[skipped:], size, strict=True)
    inner = [(0, 1) if full == 1 else (offset, length) for offset, length, full in pairs]
    return Box(tuple(offset for offset, _ in inner), tuple(length for _, length in inner))


def _box_of_window(
    shape: tuple[int, ...], offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[Box, list[list[int]] | None]:
    """Return the box of a row-major tensor of ``shape`` that a window needs, and how the window steps through it.

    For each dimension of the window, that is the number of indices in each dimension of the box; ``None`` if one
    dimension of the window goes through several of the tensor's, for which whole rows are needed.
    """
    base = window(shape, None).strides
    at, low = offset, []
    for step in base:
        low.append(at // step)
        at %= step
    high = list(low)
    steps = []
    for size, stride in zip(sizes, strides, strict=True):
        mine = []
        for dim, step in enumerate(base):
            count = 0 if shape[dim] == 1 else stride // step
            stride -= count * step
            mine.append(count)
            high[dim] += count * (size - 1)
        steps.append(mine)
    if all(index < full for index, full in zip(high, shape, strict=True)):
        return Box(tuple(low), tuple(last - first + 1 for first, last in zip(low, high, strict=True))), steps
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    first, last = offset // base[0], reach // base[0]
    return Box((first,) + (0,) * (len(shape) - 1), (last - first + 1, *shape[1:])), None
