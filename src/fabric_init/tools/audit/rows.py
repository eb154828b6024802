"""The rows of an audit, and the histories behind them that the checks read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from fabric_init.reports.expectations import Expectations, moments
from fabric_init.reports.statistics import Moments
from fabric_init.reports.trace import Tracer
from fabric_init.reports.write_history import Event, History
from fabric_init.tools.audit.findings import AuditRow
from fabric_init.tools.audit.measure.write_cost import WriteTimer


class AuditedTensor(NamedTuple):
    """A row with what it was made from.

    Attributes:
        row: as reported.
        history: the writes to the tensor.
        unwritten: some element is still uninitialized memory of ``torch.empty``.
        expectations: of its tape, if it was recorded.
        timer: measures the cost of writes.
    """

    row: AuditRow
    history: History
    unwritten: bool
    expectations: Expectations | None
    timer: WriteTimer

    def seconds_of(self, event: Event) -> float:
        """Return the cost of a write in plain PyTorch."""
        return self.timer.seconds(event.op)

    def expected(self, event: Event) -> Moments | None:
        """Return the expected moments of the elements that a write leaves behind."""
        return None if self.expectations is None else self.expectations.of_op(event.op, event.ref)


def rows_of(
    model: nn.Module, model_histories: Iterable[History], real: Mapping[str, Tensor]
) -> Iterator[AuditedTensor]:
    """Yield the row of each history.

    Args:
        model: the audited model.
        model_histories: of its tensors.
        real: the tensors that were never recorded, by name.
    """
    tracer, timer = Tracer(), WriteTimer()
    modules = dict(model.named_modules(remove_duplicate=False))
    for history in model_histories:
        slot = history.slot
        trace, dead = tracer.trace(history, run=True)
        if slot.ref is None and slot.real:
            trace = replace(trace, rule="set when built")
        if slot.name in real and (values := moments(real[slot.name])) is not None:
            trace = replace(trace, mean=values.mean, std=values.std)
        row = AuditRow(
            **vars(trace),
            module_class=type(modules[slot.name.rpartition(".")[0]]).__name__,
            wasted_seconds=sum(timer.seconds(event.op) for event in dead),
        )
        expectations = None if history.tape is None else tracer.expectations(history.tape)
        yield AuditedTensor(row, history, history.never_written, expectations, timer)
