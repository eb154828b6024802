"""The internal record of how each model is filled, from which its frozen reports are made."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fabric_init.errors import FabricInitError
from fabric_init.reports.init_report import InitReport
from fabric_init.reports.rows import InitRow


@dataclass(eq=False)
class RowRecord:
    """The current row of one tensor; replaced when the guard notices that the tensor was written."""

    row: InitRow

    def update(self, **changes: Any) -> None:
        """Replace fields of the row; reports that were made before keep theirs."""
        self.row = replace(self.row, **changes)


@dataclass(eq=False)
class FillRecord:
    """What is known so far of how one model was filled."""

    rows: list[RowRecord] = field(default_factory=list)
    checkpoint: str | None = None
    note: str | None = None
    unexpected: tuple[str, ...] = ()

    def report(self, model: nn.Module, unfilled: Collection[RowRecord] | None = None) -> InitReport:
        """Return a report of the current state; see :func:`report_of`."""
        kept = [each for each in self.rows if unfilled is None or each.row.status != "unfilled" or each in unfilled]
        rows = tuple(each.row for each in kept)
        return InitReport(rows, self.checkpoint, self.note, self.unexpected, weakref.ref(model))


_records: weakref.WeakKeyDictionary[nn.Module, FillRecord] = weakref.WeakKeyDictionary()


def keep_record(model: nn.Module, record: FillRecord) -> InitReport:
    """Keep ``record`` for the lifetime of ``model``, and return the first report of it."""
    _records[model] = record
    return record.report(model)


def filled_by_us(model: nn.Module) -> bool:
    """Return whether fabric_init filled all of ``model``, so that no tensor is unfilled or written by the user."""
    record = _records.get(model)
    return record is not None and not any(
        each.row.status in ("unfilled", "written by the user") for each in record.rows
    )


def report_of(model: nn.Module, unfilled: Collection[RowRecord] | None = None) -> InitReport:
    """Return a report of the current state of a model that fabric_init built.

    Args:
        model: the outermost module that was built in a recorded block.
        unfilled: the tensors of the model that are still unfilled; other unfilled tensors have left it, and their
            rows are omitted. ``None`` keeps all rows.

    Raises:
        FabricInitError: the model was not built in a recorded block.
    """
    record = _records.get(model)
    if record is None:
        raise FabricInitError(
            f"there is no init report for this {type(model).__name__}: it was not built under init_module(empty_init="
            "True), init_module(checkpoint=…) or deferred_init() and materialize(). Ask for the outermost module that "
            "was built in the block."
        )
    return record.report(model, unfilled)
