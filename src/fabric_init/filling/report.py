"""What every tensor of a model got, and from where."""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fabric_init.errors import FabricInitError

Status = Literal["loaded", "initialised", "set when built", "scratch", "written by the user", "unfilled"]

_MOST_ROWS = 30


@dataclass
class Row:
    """One tensor. ``origin`` is a checkpoint key, or the init rule and the line that asked for it."""

    name: str
    status: Status
    shape: tuple[int, ...]
    dtype: str
    kind: str
    origin: str = ""
    cast_from: str | None = None
    ties: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.Size(self.shape).numel() * dtype.itemsize


@dataclass
class InitReport:
    """One row a tensor: what it got, from where. ``str()`` gives a summary and a table.

    Attributes:
        rows: in module order; ties share a row.
        checkpoint: what was loaded from, as the user named it.
        note: anything worth knowing of how the checkpoint was read.
        unexpected: checkpoint keys that the model has no tensor for (``strict=False`` ignores them).
    """

    rows: list[Row] = field(default_factory=list)
    checkpoint: str | None = None
    note: str | None = None
    unexpected: tuple[str, ...] = ()

    def count(self, status: Status) -> int:
        """How many tensors have this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def complete(self) -> bool:
        """Whether no tensor is unfilled."""
        return self.count("unfilled") == 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "note": self.note,
            "complete": self.complete,
            "counts": dict(Counter(row.status for row in self.rows)),
            "unexpected": list(self.unexpected),
            "tensors": [asdict(row) | {"shape": list(row.shape), "ties": list(row.ties)} for row in self.rows],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

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


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


_reports: weakref.WeakKeyDictionary[nn.Module, InitReport] = weakref.WeakKeyDictionary()


def keep_report(model: nn.Module, report: InitReport) -> None:
    """Remember the report for as long as the model lives."""
    _reports[model] = report


def filled_by_us(model: nn.Module) -> bool:
    """Whether fabric_init filled ``model``: no tensor is unfilled, or was written by the user before it was filled."""
    report = _reports.get(model)
    return report is not None and not any(row.status in ("unfilled", "written by the user") for row in report.rows)


def report_of(model: nn.Module) -> InitReport:
    """The report of a model that fabric_init built.

    Raises:
        FabricInitError: the model was built in no recording block.
    """
    report = _reports.get(model)
    if report is None:
        raise FabricInitError(
            f"there is no init report for this {type(model).__name__}: it was not built under init_module(empty_init="
            "True), init_module(checkpoint=…) or deferred_init() and materialize(). Ask for the outermost module that "
            "was built in the block."
        )
    return report
