"""TODO"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape import Tape
from fabric_init.reports.provenance import Write

Status = Literal["loaded", "initialized", "set when built", "scratch", "written by the user", "unfilled"]


@dataclass
class Row:
    """One tensor: what it got, from where, and, once its report was asked for it, how that came and what it is now.

    Attributes:
        name: the tensor's first name; ``ties`` has the others.
        status: what became of it.
        shape: its full shape.
        dtype: its dtype, such as ``float32``.
        kind: ``parameter``, ``buffer``, ``non-persistent buffer`` or ``attribute``.
        origin: a checkpoint key, or the init rule and the line that asked for it.
        cast_from: its dtype in the checkpoint, if another one.
        ties: further names of the same tensor.
        rule: the rule that gave it its value; empty where no recorded rule did.
        file: where the model's code asked for that rule.
        line: the line in ``file``.
        mean: the mean that the rule gives; ``None`` if that cannot be told.
        std: the standard deviation that the rule gives; likewise.
        writes: what the constructors would have written to it in plain PyTorch, in order.
        full_writes: how many of these wrote all of it; ``None`` where the recording is not known.
        wasted_elements: how many elements were written in vain there.
        mean_now: the mean of what this process holds of it, when that was last measured.
        std_now: the standard deviation of that, likewise.
    """

    name: str
    status: Status
    shape: tuple[int, ...]
    dtype: str
    kind: str
    origin: str = ""
    cast_from: str | None = None
    ties: tuple[str, ...] = ()
    rule: str = ""
    file: str | None = None
    line: int | None = None
    mean: float | None = None
    std: float | None = None
    writes: tuple[Write, ...] = ()
    full_writes: int | None = None
    wasted_elements: int | None = None
    mean_now: float | None = None
    std_now: float | None = None
    recording: Recording | None = field(default=None, repr=False, compare=False)
    tape: Tape | None = field(default=None, repr=False, compare=False)
    storage: int = field(default=-1, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.Size(self.shape).numel() * dtype.itemsize

    @property
    def place(self) -> str:
        """``file:line`` of the rule, or an empty text."""
        return f"{self.file}:{self.line}" if self.file else ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain data; numbers that are not finite become ``None``."""
        plain = {one.name: _plain(getattr(self, one.name)) for one in fields(self) if one.name not in _INTERNAL}
        return plain | {"writes": [asdict(write) for write in self.writes]}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"recording": None, "tape": None}  # a copy is plain data


_INTERNAL = ("recording", "storage", "tape")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


class Recording(NamedTuple):
    """What a row keeps to be able to tell: a tensor, and the tape that it is on."""

    slot: TensorInfo
    tape: Tape


@dataclass
class InitRecord:
    """The data of an :class:`~fabric_init.InitReport`."""

    rows: list[Row] = field(default_factory=list)
    checkpoint: str | None = None
    note: str | None = None
    unexpected: tuple[str, ...] = ()

    @property
    def not_finite(self) -> list[str]:
        """Names of tensors that held NaN or infinity when they were last measured."""
        return [row.name for row in self.rows if row.std_now is not None and not math.isfinite(row.std_now)]
