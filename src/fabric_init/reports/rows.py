"""The data of an init report: one frozen row per tensor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.provenance import Write

Status = Literal["loaded", "initialized", "set when built", "scratch", "written by the user", "unfilled"]


@dataclass(frozen=True, kw_only=True)
class TensorTrace:
    """One tensor, the init rule that determined its value, and every write that led there.

    Attributes:
        name: the first name of the tensor; ``ties`` has the others.
        shape: its full shape.
        dtype: its dtype, such as ``float32``.
        kind: ``parameter``, ``buffer``, ``non-persistent buffer`` or ``attribute``.
        ties: further names of the same tensor.
        rule: the init rule that determined its value; empty if no recorded rule did.
        file: the source file of the model that called that rule.
        line: the line in ``file``.
        mean: the expected mean under that rule; ``None`` if it is not known.
        std: the expected standard deviation under that rule; ``None`` if it is not known.
        writes: every write of the constructors in plain PyTorch, in order.
        full_writes: the number of writes to all elements; ``None`` if the recording is not known.
        wasted_elements: elements that were overwritten before being read (dead writes); ``None`` likewise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "parameter"
    ties: tuple[str, ...] = ()
    rule: str = ""
    file: str | None = None
    line: int | None = None
    mean: float | None = None
    std: float | None = None
    writes: tuple[Write, ...] = ()
    full_writes: int | None = None
    wasted_elements: int | None = None

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def place(self) -> str:
        """``file:line`` of the rule, or an empty string."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(frozen=True, kw_only=True)
class InitRow(TensorTrace):
    """One tensor of an init report: its status, the origin of its value, and its trace.

    Attributes:
        status: how the tensor got its value.
        origin: the checkpoint key, or the init rule and the line that called it.
        cast_from: the dtype in the checkpoint if it differs.
        mean_now: the mean of the values in the memory of this process when they were last measured.
        std_now: their standard deviation.
    """

    status: Status
    origin: str = ""
    cast_from: str | None = None
    mean_now: float | None = None
    std_now: float | None = None
    recording: Recording | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """The size of the full tensor in bytes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.elements * dtype.itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data; numbers that are not finite become ``None``."""
        plain = {each.name: _json_value(getattr(self, each.name)) for each in fields(self) if each.name != "recording"}
        return plain | {"writes": [asdict(write) for write in self.writes]}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"recording": None}  # a copy is plain data


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


class Recording(NamedTuple):
    """The recorded tensor behind a row, and its tape: what :meth:`InitReport.trace` reads."""

    slot: TensorInfo
    tape: Tape


@dataclass(frozen=True)
class InitReportData:
    """The fields of an :class:`~fabric_init.InitReport`, apart from it so that its page does not import it."""

    rows: tuple[InitRow, ...] = ()
    checkpoint: str | None = None
    note: str | None = None
    unexpected: tuple[str, ...] = ()

    @property
    def not_finite(self) -> list[str]:
        """Names of the tensors that held NaN or infinity when they were last measured."""
        return [row.name for row in self.rows if row.std_now is not None and not math.isfinite(row.std_now)]
