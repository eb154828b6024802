"""What every tensor of a model got, and from where."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from fabric_init.errors import FabricInitError
from fabric_init.planning.tensors import named_tensors, plain_name
from fabric_init.recording.tensor import recorded
from fabric_init.reports.rows import InitRecord, Status, dtype_name
from fabric_init.reports.rules import describe_rule
from fabric_init.reports.save import SavesItself, save_report
from fabric_init.reports.trace import measure, trace

_MOST_ROWS = 30


@dataclass
class InitReport(InitRecord):
    """One row a tensor: what it got, from where. ``str()`` gives a summary and a table.

    Attributes:
        rows: in module order; ties share a row.
        checkpoint: what was loaded from, as the user named it.
        note: anything worth knowing of how the checkpoint was read.
        unexpected: checkpoint keys that the model has no tensor for (``strict=False`` ignores them).
    """

    _model: weakref.ref[nn.Module] | None = field(default=None, init=False, repr=False, compare=False)

    def trace(self) -> InitReport:
        """Work out of the recording, for every row, ``rule``, ``file``, ``line``, ``mean``, ``std`` and its writes.

        Nothing is run or read. A recording is not kept where the constructor brought in more than 16 MB of values.

        Returns:
            This report.
        """
        trace(self.rows)
        return self

    def measure(self) -> InitReport:
        """:meth:`trace`, and read every tensor that this process holds for its ``mean_now`` and ``std_now``.

        Of a tensor that is sharded over ranks, this rank's part is measured; what ZeRO-3 has partitioned is not.

        Returns:
            This report.

        Raises:
            FabricInitError: the model is gone, or this report is a copy.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise FabricInitError(
                "there is nothing to measure: the model of this report is gone, or the report is a copy. Keep the "
                "model, and ask for its report: fabric_init.init_report(model)."
            )
        self.trace()
        measure(self.rows, model)
        return self

    def count(self, status: Status) -> int:
        """How many tensors have this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether no tensor is unfilled."""
        return self.count("unfilled") == 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON, with all that :meth:`trace` gives."""
        self.trace()
        return {
            "checkpoint": self.checkpoint,
            "note": self.note,
            "complete": self.complete,
            "counts": dict(Counter(row.status for row in self.rows)),
            "unexpected": list(self.unexpected),
            "not_finite": self.not_finite,
            "tensors": [row.to_dict() for row in self.rows],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: a page with plots where ``path`` ends in ``.html``, :meth:`to_dict` as JSON otherwise.

        :meth:`measure` first, for what is in memory now.

        Raises:
            FabricInitError: a page is asked for, and Plotly is not installed.
        """
        save_report(path, self.to_dict, self._page)

    def _page(self) -> SavesItself:
        from fabric_init.reports.html.init_page import page_of  # HTML is only for whoever wants a page

        return page_of(self.trace())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None}

    def __str__(self) -> str:
        counts = Counter(row.status for row in self.rows)
        sizes: Counter[str] = Counter()
        for row in self.rows:
            sizes[row.status] += row.nbytes
        head = f"{len(self.rows)} tensor{'s' if len(self.rows) != 1 else ''}: " + ", ".join(
            f"{number} {status} ({_megabytes(sizes[status])})" for status, number in counts.most_common()
        )
        lines = [head]
        if self.checkpoint:
            lines.append(f"checkpoint: {self.checkpoint}" + (f" ({self.note})" if self.note else ""))
        casts = Counter(f"{row.cast_from} → {row.dtype}" for row in self.rows if row.cast_from)
        lines += [f"cast: {number} tensors {cast}" for cast, number in casts.items()]
        if self.unexpected:
            shown = ", ".join(self.unexpected[:5]) + (" …" if len(self.unexpected) > 5 else "")
            keys = "1 checkpoint key" if len(self.unexpected) == 1 else f"{len(self.unexpected)} checkpoint keys"
            lines.append(f"ignored: {keys} that the model does not have: {shown}")
        # what was not loaded is what one looks for: it comes first, the rest fills the room that is left
        rows = sorted(self.rows, key=lambda row: row.status == "loaded")[:_MOST_ROWS]
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            ties = f" = {', '.join(row.ties)}" if row.ties else ""
            lines.append(
                f"  {row.name:<{width}}  {row.status:<14} {shape:>12} {row.dtype:<9} {row.origin}{ties}".rstrip()
            )
        if len(self.rows) > len(rows):
            lines.append(f"  … and {len(self.rows) - len(rows)} more (.rows has all)")
        return "\n".join(lines)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


_reports: weakref.WeakKeyDictionary[nn.Module, InitReport] = weakref.WeakKeyDictionary()


def keep_report(model: nn.Module, report: InitReport) -> None:
    """Remember the report for as long as the model lives."""
    _reports[model] = report
    report._model = weakref.ref(model)


def filled_by_us(model: nn.Module) -> bool:
    """Whether fabric_init filled ``model``: no tensor is unfilled, or was written by the user before it was filled."""
    report = _refreshed(model)
    return report is not None and not any(row.status in ("unfilled", "written by the user") for row in report.rows)


def report_of(model: nn.Module) -> InitReport:
    """The report of a model that fabric_init built.

    Raises:
        FabricInitError: the model was built in no recording block.
    """
    report = _refreshed(model)
    if report is None:
        raise FabricInitError(
            f"there is no init report for this {type(model).__name__}: it was not built under init_module(empty_init="
            "True), init_module(checkpoint=…) or deferred_init() and materialize(). Ask for the outermost module that "
            "was built in the block."
        )
    return report


def _refreshed(model: nn.Module) -> InitReport | None:
    """The report, in which the rows of tensors that had no values are up to date; of those that are gone, they go."""
    report = _reports.get(model)
    if report is None or not any(row.status == "unfilled" for row in report.rows):
        return report
    held = {plain_name(name): tensor for name, _, tensor in named_tensors(model)}
    for row in list(report.rows):
        if row.status != "unfilled" or row.tape is None:
            continue
        tensor = held.get(row.name)
        if tensor is None:
            report.rows.remove(row)
            continue
        row.dtype = dtype_name(tensor.dtype)
        waiting = row.tape.current().later.waiting
        record = recorded(tensor._local_tensor if isinstance(tensor, DTensor) else tensor)
        if record is None or record.memory is not None or not record.tape.later.waiting.missing([record.storage]):
            row.status = waiting.statuses.get(row.storage, "written by the user")
            if row.status == "initialized" and row.recording is not None and row.recording.slot.ref is not None:
                row.origin = describe_rule(row.recording.tape, row.recording.slot.ref)
    return report
