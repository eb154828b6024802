"""The public function: from a model to an :class:`~fabric_init.tools.audit.report.AuditReport`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fabric_init._gc import PausedCollector
from fabric_init.api import deferred_init
from fabric_init.errors import RecordingError
from fabric_init.planning.tensors import TensorInfo, survey
from fabric_init.recording.tape import Tape
from fabric_init.reports.registry import filled_by_us, report_of
from fabric_init.reports.write_history import histories
from fabric_init.tools.audit.checks.never_written import tape_findings
from fabric_init.tools.audit.probe import examine
from fabric_init.tools.audit.report import AuditReport
from fabric_init.tools.audit.rows import rows_of

MSG_NO_RECORDING = """\
{model} was built eagerly, so nobody knows what wrote its tensors. Record it:

    with fabric_init.deferred_init():
        model = build()
    fabric_init.audit(model)

or let the audit record it: fabric_init.audit(build), where build() returns the model."""


def audit(model: nn.Module | Callable[[], nn.Module], batch: Any = None) -> AuditReport:
    """Whether a model's init is any good: what wrote each tensor, how often, with what result, and what looks wrong.

    No weight memory is taken and no init runs, but for small samples that are measured. With a ``batch`` a copy of the
    model is filled and run once, forward and backward, if its own code gives every tensor a value.

    Args:
        model: a model that was recorded (under :func:`~fabric_init.deferred_init`, say), filled or not; or a callable
            without arguments that builds one, which is then recorded.
        batch: also run the model once: a tensor, a tuple of ``forward``'s arguments with the labels as one more, or a
            mapping from argument name to tensor; ``"auto"`` makes one up, where the model says what it takes. ``None``
            leaves that out.

    Returns:
        One row a tensor, and the findings, the worst first.

    Raises:
        RecordingError: the model has no recording.
        TypeError: ``model`` is neither a module nor a callable that returns one.
        FabricInitError: the model cannot be run with ``batch``.
    """
    built = model if isinstance(model, nn.Module) else _record(model)
    with PausedCollector():
        slots, tapes, real = _recording(built, given=built is model)
        told = list(rows_of(built, histories(slots, tapes), real))
        rows = tuple(one.row for one in told)
        findings = tape_findings(built, told)
    report = AuditReport(type(built).__name__, rows, tuple(findings))
    if batch is None or any(one.unwritten and one.history.slot.saved for one in told):
        return report
    layers, first, expected, seen = examine(built, rows, batch)
    worst_first = sorted((*seen, *findings), key=lambda finding: -finding.level)
    return replace(report, findings=tuple(worst_first), layers=layers, first_loss=first, expected_loss=expected)


def _recording(model: nn.Module, *, given: bool) -> tuple[list[TensorInfo], Mapping[int, Tape], dict[str, Tensor]]:
    """The model's tensors, the tapes that they are on, and those with memory that were never on any."""
    slots, tensors, tapes = survey(model)
    if not tapes and filled_by_us(model):  # its tensors have values now; the report remembers where they were recorded
        kept = [row.recording for row in report_of(model).rows if row.recording is not None]
        slots = [one.slot for one in kept]
        return slots, {one.slot.ref.storage: one.tape.current() for one in kept if one.slot.ref is not None}, {}
    if given and slots and not tapes:
        raise RecordingError(MSG_NO_RECORDING.format(model=type(model).__name__))
    return slots, tapes, {slot.name: tensor for slot, tensor in zip(slots, tensors, strict=True) if slot.real}


def _record(build: Callable[[], nn.Module]) -> nn.Module:
    if not callable(build):
        raise TypeError(f"audit takes a module, or a callable that builds one, not {type(build).__name__}")
    with deferred_init():
        model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit: the callable returned {type(model).__name__}, not a torch.nn.Module")
    return model
