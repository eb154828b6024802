"""Record once more how a tensor was computed, from what its sources hold by now."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.op_properties import only_copies
from fabric_init.recording.tape.tape import Op, Tape, TensorRef, now, on_other_storages


def reads_any(tape: Tape, storage: int, others: Collection[int]) -> bool:
    """Return whether a tensor was computed, and not just copied, from one of ``others``, as it was then."""
    live = [tape.ops[number] for number in live_ops(tape, [storage], exact=False, cut=others)]
    return any(ref.storage in others for op in live for ref in op.reads()) and not all(
        only_copies(o.func) for o in live
    )


def recompute(tape: Tape, ref: TensorRef, given: Collection[int], instead: Mapping[int, int]) -> None:
    """Append the ops that compute the tensor at ``ref`` to the tape again, and a write of their result to ``ref``.

    Args:
        tape: The recording.
        ref: A tensor that was computed from others.
        given: The storages of those that have been written since. Their present values are used.
        instead: Other storages to read in the place of some of ``given``.
    """
    moved = dict(instead)

    def new(storage: int) -> int:
        if storage in given and storage not in moved:
            return storage
        if storage not in moved:
            moved[storage] = tape.add_storage(*tape.storages[storage])
        return moved[storage]

    for number in sorted(live_ops(tape, [ref.storage], exact=False, cut=given)):
        op = tape.ops[number]
        if all(written.storage in given for written in (*op.targets, *op.outputs)):
            continue  # an earlier draw from the same stream
        tape.repeat(op, new)
    tape.append(Op(now(), torch.ops.aten.copy_.default, (ref, on_other_storages(ref, new)), {}, (ref,), ()))
