"""The writes to each tensor of a recorded model, in order, and which of them are dead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.liveness import covers, live_ops, never_written
from fabric_init.recording.tape.op_properties import only_copies, overwrites
from fabric_init.recording.tape.tape import CallSite, Op, Tape, TensorRef


class Event(NamedTuple):
    """One op that wrote to a tensor, or to the tensor that it is a copy of.

    Attributes:
        op: the recorded op.
        ref: the part of the storage that it wrote.
        whole: every element of the tensor was written, regardless of its old value.
        dead: no value of the finished model depends on the write.
    """

    op: Op
    ref: TensorRef
    whole: bool
    dead: bool

    @property
    def source(self) -> CallSite | None:
        """The line of the model that called the op."""
        return self.op.source

    @property
    def by_default(self) -> bool:
        """Whether torch chose the rule, in the constructor of one of its modules."""
        return self.op.source is not None and self.op.source.constructed

    @property
    def created(self) -> bool:
        """Whether the op created the tensor (such as ``torch.zeros``), rather than write to existing memory."""
        return bool(self.op.outputs)

    @property
    def is_rule(self) -> bool:
        """Whether the code of the model chose the rule, for a tensor that existed."""
        return not self.by_default and not self.created


class History(NamedTuple):
    """A tensor and the events that wrote to it, in order."""

    slot: TensorInfo
    tape: Tape | None
    events: tuple[Event, ...]

    @property
    def winner(self) -> Event | None:
        """The last full write, or the last write if there is no full one."""
        return last_full_write(reversed(self.events))[0]

    @property
    def later(self) -> tuple[Event, ...]:
        """The writes after the winner: to a part, or computed from the old value."""
        return last_full_write(reversed(self.events))[1]

    @property
    def never_written(self) -> bool:
        """Whether some element is still uninitialized memory of ``torch.empty``."""
        if self.slot.ref is None or self.tape is None:
            return False
        winner = self.winner
        if winner is not None and winner.whole and not winner.op.reads():
            return False  # the usual case, decided without the tape
        return never_written(self.tape, self.slot.ref)


def histories(slots: Sequence[TensorInfo], tapes: Mapping[int, Tape]) -> list[History]:
    """Return one history for each parameter and buffer, in the order of ``slots``."""
    by_tape: dict[Tape, set[int]] = defaultdict(set)
    for storage, tape in tapes.items():
        by_tape[tape].add(storage)
    live = {tape: live_ops(tape, storages, exact=False) for tape, storages in by_tape.items()}
    result = []
    for slot in slots:
        if slot.kind == "attribute":
            continue
        if slot.ref is None:
            result.append(History(slot, None, ()))
        else:
            own = tapes[slot.ref.storage]
            result.append(History(slot, own, _events(own, slot.ref, live[own])))
    return result


def _events(tape: Tape, ref: TensorRef, live: set[int]) -> tuple[Event, ...]:
    backward = [event._replace(dead=event.op.number not in live) for event in events_backward(tape, ref)]
    return tuple(reversed(backward))


def last_full_write(backward: Iterable[Event]) -> tuple[Event | None, tuple[Event, ...]]:
    """Return the event that determined a value, and the events after it in order.

    Args:
        backward: the events of a tensor, the last first; read up to the last full write.
    """
    later: list[Event] = []
    for event in backward:
        if event.whole:
            return event, tuple(reversed(later))
        later.append(event)
    return (later[0] if later else None), ()


def events_backward(tape: Tape, ref: TensorRef, before: int | None = None) -> Iterator[Event]:
    """Yield the writes to ``ref``, the last first; ``dead`` is not worked out.

    Args:
        tape: the tape of the tensor.
        ref: the tensor.
        before: only ops with lower numbers count.
    """
    for number in reversed(tape.writers.get(ref.storage, ())):
        if before is not None and number >= before:
            continue
        op = tape.ops[number]
        target = next((each for each in (*op.targets, *op.outputs) if each.storage == ref.storage), None)
        if target is None or not spans_overlap(target, ref):
            continue
        original = _copied_from(op) if op.outputs else None
        if original is not None and original.size == ref.size:  # created as a copy, so the original has the history
            yield from events_backward(tape, original, number)
            continue
        replaces = overwrites(op.func) and all(read.storage != ref.storage for read in op.reads())
        whole = bool(op.outputs) or (replaces and (target == ref or covers(tape, target)))
        yield Event(op, target, whole, dead=False)


def _copied_from(op: Op) -> TensorRef | None:
    return next(iter(op.reads()), None) if only_copies(op.func) else None


def byte_span(ref: TensorRef) -> tuple[int, int]:
    """Return the byte range from the first to past the last element."""
    if ref.size.numel() == 0:
        return 0, 0
    last = sum(stride * (size - 1) for stride, size in zip(ref.stride, ref.size, strict=True))
    return ref.offset * ref.dtype.itemsize, (ref.offset + last + 1) * ref.dtype.itemsize


def spans_overlap(first: TensorRef, second: TensorRef) -> bool:
    """Return whether the byte ranges of two tensors of one storage overlap."""
    start, end = byte_span(first)
    other_start, other_end = byte_span(second)
    return start < other_end and other_start < end
