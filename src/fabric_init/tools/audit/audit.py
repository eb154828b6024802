"""The public function: from a model to an :class:`~fabric_init.tools.audit.report.AuditReport`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fabric_init._gc import PausedCollector
from fabric_init.api import deferred_init
from fabric_init.errors import RecordingError
from fabric_init.planning.tensors import TensorInfo, tensors_and_tapes
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.registry import filled_by_us, report_of
from fabric_init.reports.write_history import histories
from fabric_init.tools.audit.checks.tape_only import tape_findings
from fabric_init.tools.audit.measure.probe import examine
from fabric_init.tools.audit.report import AuditReport
from fabric_init.tools.audit.rows import rows_of

MSG_NO_RECORDING = """\
{model} was built eagerly, so the writes to its tensors are unknown. Record it:

    with fabric_init.deferred_init():
        model = build()
    fabric_init.audit(model)

or let the audit record it: fabric_init.audit(build), where build() returns the model."""


def audit(model: nn.Module | Callable[[], nn.Module], batch: Any = None) -> AuditReport:
    """Audit the init of a model: which rules write each tensor, how often, with what result, and what looks wrong.

    No weight memory is allocated and no init runs, except for small samples that are measured. With a ``batch``, a copy
    of the model is filled and run once, forward and backward, if its own code initializes every tensor.

    Args:
        model: a model that was recorded (for example under :func:`~fabric_init.deferred_init`), filled or not; or a
            callable without arguments that builds one, which is then recorded.
        batch: also run the model once: a tensor, a tuple of ``forward``'s arguments with the labels as one more, or a
            mapping from argument name to tensor; ``"auto"`` generates a batch if the model declares its inputs.
            ``None`` does not run the model.

    Returns:
        One row per tensor, and the findings, the worst first.

    Raises:
        RecordingError: the model has no recording.
        TypeError: ``model`` is neither a module nor a callable that returns one.
        FabricInitError: the model cannot be run with ``batch``.
    """
    built = model if isinstance(model, nn.Module) else _record(model)
    with PausedCollector():
        slots, tapes, real = _recording(built, is_model=built is model)
        tensors = list(rows_of(built, histories(slots, tapes), real))
        rows = tuple(each.row for each in tensors)
        findings = tape_findings(built, tensors)
    report = AuditReport(type(built).__name__, rows, tuple(findings))
    if batch is None or any(each.unwritten and each.history.slot.saved for each in tensors):
        return report
    layers, first, expected, seen = examine(built, rows, batch)
    worst_first = sorted((*seen, *findings), key=lambda finding: -finding.level)
    return replace(report, findings=tuple(worst_first), layers=layers, first_loss=first, expected_loss=expected)


def _recording(model: nn.Module, *, is_model: bool) -> tuple[list[TensorInfo], Mapping[int, Tape], dict[str, Tensor]]:
    """Return the tensors of the model, their tapes, and the tensors with memory that were never recorded."""
    slots, tensors, tapes = tensors_and_tapes(model)
    if not tapes and filled_by_us(model):  # its tensors have values now; the report has their recordings
        kept = [row.recording for row in report_of(model).rows if row.recording is not None]
        slots = [each.slot for each in kept]
        return slots, {each.slot.ref.storage: each.tape.current() for each in kept if each.slot.ref is not None}, {}
    if is_model and slots and not tapes:
        raise RecordingError(MSG_NO_RECORDING.format(model=type(model).__name__))
    return slots, tapes, {slot.name: tensor for slot, tensor in zip(slots, tensors, strict=True) if slot.real}


def _record(build: Callable[[], nn.Module]) -> nn.Module:
    if not callable(build):
        raise TypeError(f"audit takes a module or a callable that builds one, got {type(build).__name__}")
    with deferred_init():
        model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit: the callable returned {type(model).__name__}, not a torch.nn.Module")
    return model
