"""What was written to each tensor of a recorded model, in order, and which of those writes anything came of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.op_schemas import only_copies, overwrites
from fabric_init.recording.tape import CallSite, Op, Tape, TensorRef


class Event(NamedTuple):
    """One op that wrote to a tensor, or to what it is a copy of.

    ``whole``: every element, whatever they held; ``dead``: nothing that the model ends up with came of it.
    """

    op: Op
    ref: TensorRef
    whole: bool
    dead: bool

    @property
    def source(self) -> CallSite | None:
        return self.op.source

    @property
    def by_default(self) -> bool:
        """Whether torch chose the rule, in the constructor of a module of its own."""
        return self.op.source is not None and self.op.source.constructed

    @property
    def made(self) -> bool:
        """Whether the tensor came into being here: ``torch.zeros``, say, rather than a rule for existing memory."""
        return bool(self.op.outputs)

    @property
    def is_rule(self) -> bool:
        """Whether the model's own code chose it, for a tensor that was there already."""
        return not self.by_default and not self.made


class History(NamedTuple):
    """A tensor and its events."""

    slot: TensorInfo
    tape: Tape | None
    events: tuple[Event, ...]

    @property
    def winner(self) -> Event | None:
        """The last write to all of it, or the last one if there was none."""
        candidates = [event for event in self.events if event.whole] or self.events
        return candidates[-1] if candidates else None

    @property
    def later(self) -> tuple[Event, ...]:
        """What came after the winner: a part, or a change of what was there."""
        winner = self.winner
        return tuple(event for event in self.events if winner is not None and event.op.number > winner.op.number)


def histories(slots: Sequence[TensorInfo], tapes: Mapping[int, Tape]) -> list[History]:
    """One history a parameter or buffer, in the order of ``slots``."""
    by_tape: dict[Tape, set[int]] = defaultdict(set)
    for storage, tape in tapes.items():
        by_tape[tape].add(storage)
    live = {tape: tape.live(storages, exact=False) for tape, storages in by_tape.items()}
    found = []
    for slot in slots:
        if slot.kind == "attribute":
            continue
        if slot.ref is None:
            found.append(History(slot, None, ()))
        else:
            own = tapes[slot.ref.storage]
            found.append(History(slot, own, tuple(_events(own, slot.ref, live[own], None))))
    return found


def _events(tape: Tape, ref: TensorRef, live: set[int], before: int | None) -> Iterator[Event]:
    for number in tape.writers.get(ref.storage, ()):
        if before is not None and number >= before:
            break
        op = tape.ops[number]
        target = next((one for one in (*op.targets, *op.outputs) if one.storage == ref.storage), None)
        if target is None or not overlap(target, ref):
            continue
        original = _copied(op) if op.outputs else None
        if original is not None and original.size == ref.size:  # made as a copy: what it is a copy of has the history
            yield from _events(tape, original, live, number)
            continue
        replaces = overwrites(op.func) and all(read.storage != ref.storage for read in op.reads())
        whole = bool(op.outputs) or (replaces and (target == ref or tape.covers(target)))
        yield Event(op, target, whole, number not in live)


def _copied(op: Op) -> TensorRef | None:
    return next(op.reads(), None) if only_copies(op.func) else None


def span(ref: TensorRef) -> tuple[int, int]:
    """The bytes between the first and past the last of its elements."""
    if ref.size.numel() == 0:
        return 0, 0
    last = sum(stride * (size - 1) for stride, size in zip(ref.stride, ref.size, strict=True))
    return ref.offset * ref.dtype.itemsize, (ref.offset + last + 1) * ref.dtype.itemsize


def overlap(one: TensorRef, other: TensorRef) -> bool:
    """Whether their spans meet."""
    start, end = span(one)
    other_start, other_end = span(other)
    return start < other_end and other_start < end
