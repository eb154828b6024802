"""One row a tensor: the rule that won, what it gives, and what was written in vain on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fabric_init._text import dtype_name
from fabric_init.recording.tape import Tape
from fabric_init.reports.expectations import Expectations, moments
from fabric_init.reports.provenance import file_of, rule_said, write_of
from fabric_init.reports.statistics import Moments
from fabric_init.reports.write_history import Event, History
from fabric_init.tools.audit.findings import Row
from fabric_init.tools.audit.write_cost import WriteTimer


class AuditedTensor(NamedTuple):
    """What the checks look at: a row, and the history that it was made from."""

    row: Row
    history: History
    unwritten: bool  # some of it is as torch.empty made it
    expectations: Expectations | None
    stopwatch: WriteTimer

    def seconds_of(self, event: Event) -> float:
        """What this one write costs in plain PyTorch."""
        return self.stopwatch.seconds(event.op)


def rows_of(model: nn.Module, found: Iterable[History], real: Mapping[str, Tensor]) -> Iterator[AuditedTensor]:
    """The row of each history. ``real`` has the tensors that were never recorded, by name."""
    expectations: dict[Tape, Expectations] = {}
    stopwatch = WriteTimer()
    counted: set[int] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for history in found:
        slot, tape = history.slot, history.tape
        known = None if tape is None else expectations.setdefault(tape, Expectations(tape))
        expected = moments(real[slot.name]) if slot.name in real else None
        unwritten = _unwritten(history)
        if slot.ref is not None and known is not None and not unwritten:
            expected = known.of(slot.ref)
        dead = [event for event in history.events if event.dead and event.op.number not in counted]
        counted.update(event.op.number for event in dead)
        source = None if history.winner is None else history.winner.source
        module = modules[slot.name.rpartition(".")[0]]
        row = Row(
            name=slot.name,
            shape=tuple(slot.shape),
            dtype=dtype_name(slot.dtype),
            module_class=type(module).__name__,
            rule=rule_said(history) if slot.ref is not None else "set when built" if slot.real else "",
            file=file_of(source),
            line=None if source is None else source.line,
            mean=None if expected is None else expected.mean,
            std=None if expected is None else expected.std,
            writes=tuple(write_of(event) for event in history.events),
            full_writes=sum(event.whole for event in history.events),
            wasted_elements=sum(event.ref.size.numel() for event in dead),
            wasted_seconds=sum(stopwatch.seconds(event.op) for event in dead),
            kind=slot.kind,
            ties=slot.names[1:],
        )
        yield AuditedTensor(row, history, unwritten, known, stopwatch)


def _unwritten(history: History) -> bool:
    ref, tape, winner = history.slot.ref, history.tape, history.winner
    if ref is None or tape is None:
        return False
    if winner is not None and winner.whole and not any(True for _ in winner.op.reads()):
        return False  # the usual case, without a look at the tape
    return tape.never_written(ref)


def expected_of(told: AuditedTensor, event: Event) -> Moments | None:
    """What this one write leaves where it wrote."""
    return None if told.expectations is None else told.expectations.of_op(event.op, event.ref)
