"""The rows of the report for the entries of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from fabric_init._text import dtype_name
from fabric_init.checkpoints import CheckpointReader
from fabric_init.planning.plan import Action, Plan, PlanEntry
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.provenance import describe_rule
from fabric_init.reports.registry import FillRecord, RowRecord
from fabric_init.reports.rows import InitRow
from fabric_init.reports.trace import recording_of


def make_record(plan: Plan, tapes: Mapping[int, Tape], reader: CheckpointReader | None) -> FillRecord:
    """Return the rows of the report for the entries of a plan: one for all that is made of one plain tensor."""
    found: dict[int, tuple[PlanEntry, dict[str, None]]] = {}
    for entry in plan.entries:
        source = entry.made_of or entry
        found.setdefault(id(source), (source, {}))[1][entry.kind] = None
    records = [_row(source, tapes, [kind for kind in kinds if kind]) for source, kinds in found.values()]
    path = None if reader is None else str(reader.path)
    return FillRecord(records, path, _note_of(plan, reader), plan.unexpected)


def _row(entry: PlanEntry, tapes: Mapping[int, Tape], kinds: list[str]) -> RowRecord:
    slot = entry.slot
    origin = ""
    if entry.action is Action.LOAD:
        origin = ", ".join(entry.keys)
        if entry.spec is not None and entry.spec.made:
            origin += f" ({entry.spec.made})"
    elif entry.action is Action.INIT and slot.ref is not None:
        origin = describe_rule(tapes[slot.ref.storage], slot.ref)
    record = RowRecord(
        InitRow(
            name=slot.name,
            status=entry.action.value,
            shape=tuple(slot.shape),
            dtype=dtype_name(slot.dtype),
            kind=slot.kind,
            origin=f"{origin}, made into {' and '.join(kinds)}" if kinds else origin,
            cast_from=None if entry.cast_from is None else dtype_name(entry.cast_from),
            ties=slot.names[1:],
            recording=None if slot.ref is None else recording_of(slot, tapes[slot.ref.storage]),
        )
    )
    if entry.action is Action.WAIT and slot.ref is not None:
        record.waits_on(tapes[slot.ref.storage], slot.ref.storage)
    return record


def _note_of(plan: Plan, reader: CheckpointReader | None) -> str | None:
    """Return what the user should know of how a checkpoint was read, and of what was loaded from it."""
    return "; ".join(filter(None, [reader.note, *plan.notes])) or None if reader is not None else None
