"""The internal record of how each model is filled, from which its frozen reports are made."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from fabric_init._text import dtype_name
from fabric_init.errors import FabricInitError
from fabric_init.planning.tensors import Walked, named_modules, named_tensors, plain_name
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.reports.init_report import InitReport
from fabric_init.reports.provenance import describe_rule
from fabric_init.reports.rows import InitRow


@dataclass(eq=False)
class RowRecord:
    """The current row of one tensor; replaced when the guard notices that the tensor was written."""

    row: InitRow
    tape: Tape | None = None
    storage: int = -1

    def waits_on(self, tape: Tape, storage: int) -> None:
        """Note the recorded storage whose values the tensor of an unfilled row waits for."""
        self.tape, self.storage = tape, storage

    def refresh(self, tensor: Tensor) -> None:
        """Update an unfilled row from ``tensor``, which the model holds under its name now."""
        assert self.tape is not None
        waiting = self.tape.current().after_block.waiting
        records = [found for part in recorded_parts(tensor) if (found := recorded(part)) is not None]
        self.update(dtype=dtype_name(tensor.dtype))
        if not any(each.memory is None and each.tape.after_block.waiting.missing([each.storage]) for each in records):
            status = waiting.statuses.get(self.storage, "written by the user")
            origin, recording = self.row.origin, self.row.recording
            if status == "initialized" and recording is not None and recording.slot.ref is not None:
                origin = describe_rule(recording.tape, recording.slot.ref)
            self.update(status=status, origin=origin)

    def update(self, **changes: Any) -> None:
        """Replace fields of the row; reports that were made before keep theirs."""
        self.row = replace(self.row, **changes)


@dataclass(eq=False)
class FillRecord:
    """What is known so far of how one model was filled. Rows are made when they are first asked for: few are."""

    make_rows: Callable[[], list[RowRecord]]
    checkpoint: str | None = None
    note: str | None = None
    unexpected: tuple[str, ...] = ()

    @cached_property
    def rows(self) -> list[RowRecord]:
        """The row of each tensor."""
        made = self.make_rows()
        self.make_rows = list
        return made

    def refresh(self, model: nn.Module) -> None:
        """Update the rows of tensors that had no values; those of tensors that ``model`` has given up go."""
        waiting = [each for each in self.rows if each.row.status == "unfilled" and each.tape is not None]
        if not waiting:
            return
        held = {plain_name(name): tensor for name, _, tensor in named_tensors(model)}
        for each in waiting:
            tensor = held.get(each.row.name)
            if tensor is None:
                self.rows.remove(each)
            else:
                each.refresh(tensor)

    def report(self, model: nn.Module) -> InitReport:
        """Return a report of the current state."""
        rows = tuple(each.row for each in self.rows)
        return InitReport(rows, self.checkpoint, self.note, self.unexpected, weakref.ref(model))


_records: weakref.WeakKeyDictionary[nn.Module, FillRecord] = weakref.WeakKeyDictionary()


_statuses: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def note_status(module: nn.Module, attribute: str, status: str) -> None:
    """Note how a tensor of a module got its values before the model was filled."""
    _statuses.setdefault(module, {})[attribute] = status


def note_loaded(model: nn.Module, tensors: Iterable[tuple[nn.Module, str]]) -> set[str]:
    """Note in the report on ``model`` that a load has overwritten these tensors: a module, and a name in it.

    Returns:
        Their names in ``model``.
    """
    prefixes: dict[int, list[str]] = {}
    for prefix, module in named_modules(model):
        prefixes.setdefault(id(module), []).append(f"{prefix}." if prefix else "")
    names = {plain_name(p + attribute) for module, attribute in tensors for p in prefixes.get(id(module), [])}
    record = _records.get(model)
    for row in record.rows if record is not None else ():
        if not names.isdisjoint((row.row.name, *row.row.ties)):
            row.update(status="loaded", origin="")
    return names


def statuses(model: Walked) -> dict[str, str]:
    """Return what :func:`note_status` knows of ``model``, by the names of its tensors."""
    if not _statuses:
        return {}
    return {
        f"{prefix}.{attribute}" if prefix else attribute: status
        for prefix, module in named_modules(model)
        for attribute, status in _statuses.get(module, {}).items()
    }


def keep_record(model: nn.Module, record: FillRecord) -> None:
    """Keep ``record`` for the lifetime of ``model``."""
    _records[model] = record


def has_record(model: nn.Module) -> bool:
    """Return whether ``model`` was filled, or planned for, as a whole."""
    return model in _records


def filled_by_us(model: nn.Module) -> bool:
    """Return whether fabric_init filled all of ``model``, so that no tensor is unfilled or written by the user."""
    record = _refreshed(model)
    return record is not None and not any(
        each.row.status in ("unfilled", "written by the user") for each in record.rows
    )


def _refreshed(model: nn.Module) -> FillRecord | None:
    record = _records.get(model)
    if record is not None:
        record.refresh(model)
    return record


def report_of(model: nn.Module) -> InitReport:
    """Return a report of the current state of a model that fabric_init built.

    Raises:
        FabricInitError: the model was not built in a recorded block.
    """
    record = _refreshed(model)
    if record is None:
        raise FabricInitError(
            f"there is no init report for this {type(model).__name__}: it was not built under init_module(empty_init="
            "True), init_module(checkpoint=…) or deferred_init() and materialize(). Ask for the outermost module that "
            "was built in the block."
        )
    return record.report(model)
