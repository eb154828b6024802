"""Liveness: which recorded ops the value of a storage depends on, and whether anything wrote it at all.

An op is *live* for a storage if the storage's value cannot be computed without it. Writes that a later full write
replaces are dead, and so is what only dead writes read: replay runs none of them. All functions read a
:class:`~fabric_init.recording.tape.tape.Tape` and change nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch

from fabric_init._torch_internals import OpOverload
from fabric_init.recording.tape.op_properties import only_copies, overwrites, pointwise
from fabric_init.recording.tape.tape import Op, Tape, TensorRef


def covers(tape: Tape, ref: TensorRef) -> bool:
    """Return whether ``ref`` spans every byte of its storage exactly once."""
    if ref.nbytes != tape.storages[ref.storage].nbytes:
        return False
    return _is_dense(reversed(ref.stride), reversed(ref.size)) or _is_dense(
        *zip(*sorted(zip(ref.stride, ref.size, strict=True)), strict=True)
    )


def _is_dense(strides: Iterable[int], sizes: Iterable[int]) -> bool:
    """Return whether elements are in memory one behind the other; the innermost dimension comes first."""
    expected = 1
    for stride, size in zip(strides, sizes, strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def writes_whole(tape: Tape, op: Op, storage: int) -> bool:
    """Return whether ``op`` sets all of ``storage`` to values that do not depend on its old ones."""
    for ref in op.outputs:
        if ref.storage == storage:
            return True
    if not overwrites(op.func):
        return False
    for ref in op.reads():
        if ref.storage == storage:
            return False
    return any(ref.storage == storage and covers(tape, ref) for ref in op.targets)


def is_conversion(op: Op) -> bool:
    """Return whether ``op`` is what ``to()``, ``contiguous()`` or ``reshape()`` do where they return a new tensor."""
    if not isinstance(op.func, OpOverload):
        return False
    name, memory_format = op.func._schema.name, op.kwargs.get("memory_format")
    return name == "aten::_to_copy" or (name == "aten::clone" and memory_format is torch.contiguous_format)


def is_final(tape: Tape, storage: int, before: int) -> bool:
    """Return whether ``storage`` already holds its last value when op number ``before`` runs."""
    writers = tape.writers.get(storage)
    return not writers or writers[-1] < before


def live_ops(
    tape: Tape,
    storages: Iterable[int],
    *,
    exact: bool,
    before: int | None = None,
    inputs: Collection[int] = (),
    cut: Collection[int] = (),
) -> set[int]:
    """Return the numbers of the ops that have to run so that ``storages`` hold their recorded values.

    For each storage these are its last full write and the writes after it, but for parts that are overwritten later,
    and the same for every storage that those read, as of the op that reads it.

    Args:
        tape: The recording.
        storages: Storage numbers.
        exact: Draw the default random stream in order: a live draw makes all earlier draws live. Streams that the
            constructor seeded itself are always drawn in order.
        before: Take the values of ``storages`` just before this op number; the last ones if ``None``.
        inputs: Storages whose last values come from elsewhere. An op that reads the last value of one does not make
            the ops live that compute it.
        cut: Storages of which no op is live that only computes what others read there, whenever they read it.
    """
    live: set[int] = set()
    seen: set[tuple[int, int]] = set()
    skipped: set[int] = set()
    storage_work = [(storage, before) for storage in storages]
    op_work: list[int] = []
    while storage_work or op_work:
        if op_work:
            index = op_work.pop()
            if index in live:
                continue
            live.add(index)
            op = tape.ops[index]
            storage_work.extend(
                (ref.storage, index)
                for ref in op.reads()
                if ref.storage not in cut and (ref.storage not in inputs or not is_final(tape, ref.storage, index))
            )
            draw = op.draw
            if draw is not None and draw.previous is not None and (exact or tape.streams[draw.stream].exact):
                op_work.append(draw.previous)
            continue
        storage, limit = storage_work.pop()
        overwritten: set[TensorRef] = set()  # parts that ops after the present one write in full
        for index in reversed(tape.writers.get(storage, ())):
            if limit is not None and index >= limit:
                continue
            op = tape.ops[index]
            if overwritten and (here := _on(op.targets, storage)) and here <= overwritten:
                skipped.add(storage)
                continue
            if (storage, index) not in seen:
                seen.add((storage, index))
                op_work.append(index)
            elif storage not in skipped:
                break  # otherwise an earlier walk has left out ops that this one may need
            if writes_whole(tape, op, storage):
                break
            if overwrites(op.func):
                overwritten |= _on(op.targets, storage)
    return live


def _on(refs: Iterable[TensorRef], storage: int) -> set[TensorRef]:
    return {ref for ref in refs if ref.storage == storage}


def computed_from(tape: Tape, storage: int, others: Collection[int], *, copies: bool, exact: bool = False) -> set[int]:
    """Return those of ``others`` from whose last values the value of ``storage`` is computed.

    Args:
        tape: The recording.
        storage: The number of the storage in question.
        others: Storage numbers.
        copies: Whether a plain copy or cast counts as computed.
        exact: As in :func:`live_ops`.
    """
    live = [tape.ops[index] for index in live_ops(tape, [storage], exact=exact, inputs=others)]
    if not copies and all(only_copies(op.func) for op in live):
        return set()
    read = {(ref.storage, op.number) for op in live for ref in op.reads()}
    return {other for other, number in read if other in others and other != storage and is_final(tape, other, number)}


def never_written(tape: Tape, ref: TensorRef) -> bool:
    """Return whether any part of ``ref`` depends on memory that no op wrote.

    Plain PyTorch leaves whatever the allocator returned there.
    """
    if _has_unwritten_elements(tape, ref, None):
        return True
    for number in live_ops(tape, [ref.storage], exact=False):
        op = tape.ops[number]
        for read in op.reads():
            # An op that scatters values into its target needs the old ones only where it puts no new ones, and the
            # tape does not show where that is. A pointwise op on unwritten memory leaves all of it undefined.
            if (read not in op.targets or pointwise(op.func)) and _has_unwritten_elements(tape, read, number):
                return True
    return False


def _has_unwritten_elements(tape: Tape, ref: TensorRef, before: int | None) -> bool:
    """Return whether no op before number ``before`` (``None``: no op at all) wrote some element of ``ref``."""
    if ref.size.numel() == 0:
        return False
    writers = [tape.ops[number] for number in tape.writers.get(ref.storage, ()) if before is None or number < before]
    if any(writes_whole(tape, op, ref.storage) for op in writers):
        return False
    targets = [target for op in writers for target in op.targets if target.storage == ref.storage]
    if any(target == ref or target.dtype != ref.dtype for target in targets):
        return False  # through a view of another dtype, the elements of `ref` cannot be told apart
    written = torch.zeros(tape.storages[ref.storage].nbytes // ref.dtype.itemsize, dtype=torch.bool)
    for target in targets:
        written.as_strided(target.size, target.stride, target.offset).fill_(True)
    return not bool(written.as_strided(ref.size, ref.stride, ref.offset).all())
