"""The result of an inspection, as plain frozen data."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "truncated",
    "overlap",
    "gap",
    "trailing bytes",
    "wrong size",
    "missing file",
    "missing tensor",
    "not in the index",
    "listed twice",
    "unknown dtype",
    "unreadable",
    "digest",
    "NaN",
    "Inf",
]
"""The kinds of damage."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A defect, with the file and the tensors that it affects, if these are known."""

    kind: Kind
    message: str
    file: str | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Values:
    """Statistics of the elements of a tensor; for complex tensors, of real and imaginary parts.

    ``min`` to ``std`` are those of all finite elements (``nan`` if there are none), ``std`` without correction.
    ``digest`` is equal for equal values of tensors of the same shape and dtype.
    """

    min: float
    max: float
    mean: float
    std: float
    nans: int
    infs: int
    digest: str


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor.

    Attributes:
        key: its checkpoint key.
        shape: in elements.
        dtype: as torch names it, or as the file does if torch does not know it.
        nbytes: the bytes of its elements.
        files: the files that hold them.
        offset: the first byte in the first file, if the header has it.
        whole: the files have all of its elements.
        values: their statistics, if values were read.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    files: tuple[str, ...]
    offset: int | None = None
    whole: bool = True
    values: Values | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file: its bytes (``None`` for a missing file), the number of tensors in it, and their bytes."""

    name: str
    nbytes: int | None
    tensors: int
    tensor_nbytes: int


@dataclass(frozen=True, slots=True)
class CheckpointContents:
    """The contents of a checkpoint. ``str()`` returns a summary and all damage.

    Attributes:
        path: as the user named it.
        format: the format in words.
        note: how it was read, if that is notable.
        tensors: in file order.
        files: every file that belongs to it.
        entries: the number of tensors of each state dict, by its ``entry=`` name (``""`` is the outermost).
        ties: tensors that share bytes in the file: a weight under several names.
        duplicates: other tensors of equal values, without constant ones; only if values were read.
        damage: the defects; empty for a sound checkpoint.
    """

    path: str
    format: str
    note: str | None
    tensors: tuple[TensorRow, ...]
    files: tuple[FileRow, ...]
    entries: dict[str, int]
    ties: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, ...], ...]
    damage: tuple[Damage, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no damage."""
        return not self.damage

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, tied ones once."""
        again = {key for tie in self.ties for key in tie[1:]}
        return sum(row.nbytes for row in self.tensors if row.key not in again)

    @property
    def numel(self) -> int:
        """The elements of all tensors, tied ones once."""
        again = {key for tie in self.ties for key in tie[1:]}
        return sum(row.numel for row in self.tensors if row.key not in again)

    @property
    def dtypes(self) -> dict[str, int]:
        """The bytes of each dtype, the most first."""
        sizes: Counter[str] = Counter()
        for row in self.tensors:
            sizes[row.dtype] += row.nbytes
        return dict(sizes.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with NaN and infinities as the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
        data = {"sound": self.sound, "numel": self.numel, "nbytes": self.nbytes, **asdict(self)}
        for row in data["tensors"]:
            if row["values"] is not None:
                row["values"] = {name: _json(value) for name, value in row["values"].items()}
        return data

    def __str__(self) -> str:
        dtypes = ", ".join(f"{nbytes:,} bytes of {dtype}" for dtype, nbytes in self.dtypes.items())
        head = f"{self.path}: {self.format}, {len(self.tensors)} tensors{': ' * bool(dtypes)}{dtypes}"
        damage = [f"{each.kind}: {each.file or self.path}: {each.message}" for each in self.damage]
        return "\n".join([head, *damage] if damage else [head, "sound"])


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
