"""The init report: how each tensor of a model got its value."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fabric_init._text import counted, human_bytes, shape_text
from fabric_init.errors import FabricInitError
from fabric_init.reports.rows import InitReportData, Status
from fabric_init.reports.save import SavesItself, save_report
from fabric_init.reports.trace import measure_rows, trace_rows

_MOST_ROWS = 30


@dataclass(frozen=True)
class InitReport(InitReportData):
    """How each tensor of a model got its value, at the time of the report. ``str()`` returns a summary and a table.

    A report never changes: :meth:`trace` and :meth:`measure` return new ones.

    Attributes:
        rows: one per tensor, in module order; tied names share a row.
        checkpoint: the checkpoint, as the user named it.
        note: how the checkpoint was read, if that is notable.
        unexpected: checkpoint keys without a tensor in the model (``strict=False`` ignores them).
    """

    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)

    def trace(self) -> InitReport:
        """Derive ``rule``, ``file``, ``line``, ``mean``, ``std`` and the writes of every row from the recording.

        Nothing is run or read. The recording is not kept if the constructor brought in more than 16 MB of values.

        Returns:
            A new report.
        """
        return replace(self, rows=trace_rows(self.rows))

    def measure(self) -> InitReport:
        """Do :meth:`trace`, and read every tensor of this process for its ``mean_now`` and ``std_now``.

        A tensor that is sharded over ranks is measured in the shard of this rank; tensors that ZeRO-3 has partitioned
        are not measured.

        Returns:
            A new report.

        Raises:
            FabricInitError: the model is gone, or this report is a copy.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise FabricInitError(
                "there is nothing to measure: the model of this report is gone, or the report is a copy. Keep the "
                "model and ask for its report: fabric_init.init_report(model)."
            )
        return replace(self, rows=measure_rows(trace_rows(self.rows), model))

    def count(self, status: Status) -> int:
        """Return the number of tensors with this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether no tensor is unfilled."""
        return self.count("unfilled") == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON, after :meth:`trace`."""
        rows = trace_rows(self.rows)
        return {
            "checkpoint": self.checkpoint,
            "note": self.note,
            "complete": self.complete,
            "counts": dict(Counter(row.status for row in self.rows)),
            "unexpected": list(self.unexpected),
            "not_finite": self.not_finite,
            "tensors": [row.to_dict() for row in rows],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: a page with plots where ``path`` ends in ``.html``, :meth:`to_dict` as JSON otherwise.

        Save ``report.measure()`` to include the values that are in memory now.

        Raises:
            FabricInitError: a page is requested, but Plotly is not installed.
        """
        save_report(path, self.to_dict, self._page)

    def _page(self) -> SavesItself:
        from fabric_init.reports.html.init_page import init_page  # HTML is imported on request

        return init_page(self.trace())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": None}

    def __str__(self) -> str:
        counts = Counter(row.status for row in self.rows)
        sizes: Counter[str] = Counter()
        for row in self.rows:
            sizes[row.status] += row.nbytes
        head = f"{counted(len(self.rows), 'tensor')}: " + ", ".join(
            f"{number} {status} ({human_bytes(sizes[status])})" for status, number in counts.most_common()
        )
        lines = [head]
        if self.checkpoint:
            lines.append(f"checkpoint: {self.checkpoint}" + (f" ({self.note})" if self.note else ""))
        casts = Counter(f"{row.cast_from} → {row.dtype}" for row in self.rows if row.cast_from)
        lines += [f"cast: {number} tensors {cast}" for cast, number in casts.items()]
        if self.unexpected:
            shown = ", ".join(self.unexpected[:5]) + (" …" if len(self.unexpected) > 5 else "")
            keys = counted(len(self.unexpected), "checkpoint key")
            lines.append(f"ignored: {keys} that the model does not have: {shown}")
        # tensors that were not loaded are the ones that readers look for, so they come first
        rows = sorted(self.rows, key=lambda row: row.status == "loaded")[:_MOST_ROWS]
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            shape = shape_text(row.shape)
            ties = f" = {', '.join(row.ties)}" if row.ties else ""
            lines.append(
                f"  {row.name:<{width}}  {row.status:<14} {shape:>12} {row.dtype:<9} {row.origin}{ties}".rstrip()
            )
        if len(self.rows) > len(rows):
            lines.append(f"  … and {len(self.rows) - len(rows)} more (.rows has all)")
        return "\n".join(lines)
