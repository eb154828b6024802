"""Follow recorded copies back to the whole tensor that a recorded tensor holds a part of."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fabric_init.checkpoints.region import Box
from fabric_init.recording.after_block.waiting_storages import Waiting
from fabric_init.recording.tape.liveness import is_final
from fabric_init.recording.tape.op_properties import asks_shape_only, only_copies, traits
from fabric_init.recording.tape.tape import Op, Tape, TensorRef


def wholes_of(tape: Tape, ref: TensorRef, shape: torch.Size) -> Iterator[tuple[TensorRef, Box | None]]:
    """Yield the recorded tensors of ``shape`` that ``ref`` is a copy of a part of, and which part.

    The last one is a tensor that waits for values under a name; or a tensor of its own, which is a deep copy of one, or
    computed from others. Nothing is yielded if there is no such tensor.
    """
    found: list[tuple[TensorRef, Box | None]] = []
    before: int | None = None
    while True:
        named = _named(tape, ref, shape)
        writers = tape.writers.get(ref.storage, ())
        op = tape.ops[writers[-1]] if writers else None
        written = (
            None if op is None else next((r for r in (*op.targets, *op.outputs) if r.storage == ref.storage), None)
        )
        whole = named if named is not None and named.size == shape else written
        if whole is not None and whole.size == shape:
            start = _start_in(whole, ref)
            found.append((whole, None if start is None else Box(start, tuple(ref.size))))
        if named is not None or (found and _is_deep_copy(op, shape)):
            yield from found
            return
        if op is None or (before is not None and not is_final(tape, ref.storage, before)):
            return
        source = _copied_to(op, ref)
        if source is None:
            if found and found[-1][0].storage == ref.storage and ref.storage not in tape.after_block.waiting.parts:
                yield from found
            return
        ref, before = source, op.number


def _named(tape: Tape, ref: TensorRef, shape: torch.Size) -> TensorRef | None:
    """Return what waits on the storage of ``ref``; of several tensors, the one of ``shape`` that it is part of."""
    waiting: Waiting = tape.after_block.waiting
    for each in waiting.views.get(ref.storage, ()):
        if each.size == shape and _start_in(each, ref) is not None:
            return each
    return waiting.refs.get(ref.storage)


def nearest_whole(tape: Tape, ref: TensorRef, shape: torch.Size) -> tuple[TensorRef, Box | None] | None:
    """Return the recorded tensor of ``shape`` that ``ref`` was copied from a part of last, and which part.

    A tensor without elements is a part of the one that torch has taken its dtype and device from.
    """
    before: int | None = None
    has_elements = is_part = ref.size.numel() > 0
    while before is None or is_final(tape, ref.storage, before):
        op = tape.ops[tape.writers[ref.storage][-1]] if ref.storage in tape.writers else None
        for whole in _whole_on(tape, op, ref, shape) if is_part else ():
            if (start := _start_in(whole, ref)) is not None:
                return whole, Box(start, tuple(ref.size)) if has_elements else None
        if op is None:
            return None
        if is_part:
            source = _copied_to(op, ref)
        else:  # padding, up to where torch has asked a part for its dtype
            source = next((each for each in op.refs() if each.storage != ref.storage), None)
            is_part = asks_shape_only(op.func) and source is not None and source.size.numel() > 0
        if source is None:
            return None
        ref, before = source, op.number
    return None


def _whole_on(tape: Tape, op: Op | None, ref: TensorRef, shape: torch.Size) -> Iterator[TensorRef]:
    """Yield what may be a tensor of ``shape`` on the storage of ``ref``: what was written last, or all of it."""
    if op is not None:
        targets = (each for each in (*op.targets, *op.outputs) if each.storage == ref.storage)
        yield from (each for each in targets if each.size == shape and each.dtype == ref.dtype)
    if tape.storages[ref.storage].nbytes == shape.numel() * ref.dtype.itemsize:
        yield TensorRef(ref.storage, 0, shape, _contiguous_strides(shape), ref.dtype)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[dim + 1 :].numel() for dim in range(len(shape)))


def _is_deep_copy(op: Op | None, shape: torch.Size) -> bool:
    if op is None or traits(op.func).name != "aten::clone":
        return False
    return all(ref.size == shape or ref.size.numel() == shape.numel() for ref in op.reads())


def _copied_to(op: Op, ref: TensorRef) -> TensorRef | None:
    """Return the part of another tensor that ``op`` has copied to ``ref``, a part of what it writes."""
    written, *others = (*op.targets, *op.outputs)
    if others:
        return None
    read = [each for each in op.reads() if each.storage != ref.storage]
    start = _start_in(written, ref)
    if len(read) != 1 or start is None:
        return None
    source = read[0]
    if traits(op.func).name == "aten::constant_pad_nd":  # uneven shards are padded to be scattered, and then cut again
        before = list(op.args[1])[::2]
        before += [0] * (len(source.size) - len(before))
        start = tuple(at - pad for at, pad in zip(start, reversed(before), strict=True))
    elif not only_copies(op.func) or source.size != written.size:
        return None
    ends = (at >= 0 and at + size <= most for at, size, most in zip(start, ref.size, source.size, strict=True))
    if not all(ends):
        return None
    offset = source.offset + sum(at * stride for at, stride in zip(start, source.stride, strict=True))
    return source._replace(offset=offset, size=ref.size)


def _start_in(outer: TensorRef, inner: TensorRef) -> tuple[int, ...] | None:
    """Return the index in ``outer`` of the first element of ``inner``, if that is a box of it on the same storage."""
    if len(outer.size) != len(inner.size):
        return None
    along = [  # a dimension of one element has any stride
        dim for dim, size in enumerate(outer.size) if size > 1
    ]
    if any(inner.stride[dim] != outer.stride[dim] and inner.size[dim] > 1 for dim in along):
        return None
    left, start = inner.offset - outer.offset, [0] * len(outer.size)
    for dim in sorted(along, key=lambda dim: -outer.stride[dim]):
        if not outer.stride[dim]:
            return None
        start[dim], left = divmod(left, outer.stride[dim])
    ends = (at + size <= most for at, size, most in zip(start, inner.size, outer.size, strict=True))
    return tuple(start) if left == 0 and all(at >= 0 for at in start) and all(ends) else None
