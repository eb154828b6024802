"""The rows of the report for the entries of a plan."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fabric_init._text import dtype_name
from fabric_init.checkpoints import CheckpointReader
from fabric_init.guard.waiting_tensors import is_held, waits
from fabric_init.planning.plan import Action, Plan, PlanEntry
from fabric_init.planning.tensors import Walk, find_tensors
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.reports.init_report import InitReport
from fabric_init.reports.provenance import describe_rule
from fabric_init.reports.registry import FillRecord, RowRecord, has_record, report_of, statuses
from fabric_init.reports.rows import InitRow
from fabric_init.reports.trace import keeps_much, recording_of


def make_record(plan: Plan, tapes: Mapping[int, Tape], reader: CheckpointReader | None) -> FillRecord:
    """Return the rows of the report for the entries of a plan: one for all that is made of one plain tensor."""

    def rows() -> list[RowRecord]:
        found: dict[int, tuple[PlanEntry, dict[str, None]]] = {}
        for entry in plan.entries:
            source = entry.made_of or entry
            found.setdefault(id(source), (source, {}))[1][entry.kind] = None
        return [_row(source, tapes, [kind for kind in kinds if kind]) for source, kinds in found.values()]

    path = None if reader is None else str(reader.path)
    record = FillRecord(rows, path, _note_of(plan, reader), plan.unexpected)
    if any(keeps_much(tape) for tape in set(tapes.values())):
        _ = record.rows  # without these tapes
    return record


def report_so_far(model: nn.Module) -> InitReport:
    """Return the report on ``model``; on one that nobody has filled as a whole yet, what its tensors hold by now.

    Raises:
        FabricInitError: The model was not built in a recorded block.
    """
    if has_record(model):
        return report_of(model)
    walk = Walk(model)
    found, noted = find_tensors(walk), statuses(walk)
    waiting = [waits(tensor) for _, tensor in found]
    if not (is_held(model) if any(waiting) else noted):
        return report_of(model)  # which raises
    entries, tapes = [], {}
    for (info, tensor), is_waiting in zip(found, waiting, strict=True):
        record = None if info.ref is None else recorded(tensor)
        if record is not None:
            tapes[record.storage] = record.tape
        action = Action.WAIT if is_waiting else Action.KEEP if record is None else Action.INIT
        entries.append(PlanEntry(info, action))
    made = make_record(Plan(tuple(entries)), tapes, None)
    for each in made.rows:
        if each.row.status == Action.KEEP.value:
            each.update(status=noted.get(each.row.name, each.row.status))
    return made.report(model)


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
