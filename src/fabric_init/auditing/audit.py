"""The public function: from a model to an :class:`~fabric_init.auditing.report.AuditReport`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fabric_init.auditing.checks import tape_findings
from fabric_init.auditing.report import AuditReport
from fabric_init.auditing.rows import rows_of
from fabric_init.errors import RecordingError
from fabric_init.filling.deferred import deferred_init
from fabric_init.filling.history import histories
from fabric_init.filling.materialize import survey
from fabric_init.recording.collector import PausedCollector

MSG_NO_RECORDING = """\
{model} was built eagerly, so nobody knows what wrote its tensors. Record it:

    with fabric_init.deferred_init():
        model = build()
    fabric_init.audit(model)

or let the audit record it: fabric_init.audit(build), where build() returns the model. A model that has been \
materialised is audited before that."""


def audit(model: nn.Module | Callable[[], nn.Module], batch: Any = None) -> AuditReport:
    """Whether a model's init is any good: what wrote each tensor, how often, with what result, and what looks wrong.

    No weight memory is taken and no init runs, but for small samples that are measured. With a ``batch`` a copy of the
    model is filled and run once, forward and backward.

    Args:
        model: a model that was built under :func:`~fabric_init.deferred_init` and is not filled yet, or a callable
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
    given = isinstance(model, nn.Module)
    built = model if isinstance(model, nn.Module) else _record(model)
    with PausedCollector():
        slots, tensors, tapes = survey(built)
        if given and slots and not tapes:
            raise RecordingError(MSG_NO_RECORDING.format(model=type(built).__name__))
        kept = [tensor for slot, tensor in zip(slots, tensors, strict=True) if slot.kind != "attribute"]
        told = list(rows_of(built, zip(histories(slots, tapes), kept, strict=True)))
        rows = tuple(one.row for one in told)
        findings = tape_findings(built, told)
    return AuditReport(type(built).__name__, rows, tuple(sorted(findings, key=lambda one: -one.level)))


def _record(build: Callable[[], nn.Module]) -> nn.Module:
    if not callable(build):
        raise TypeError(f"audit takes a module, or a callable that builds one, not {type(build).__name__}")
    with deferred_init():
        model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"audit: the callable returned {type(model).__name__}, not a torch.nn.Module")
    return model
