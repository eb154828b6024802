"""The answer of an inspection, as plain frozen data."""

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
"""What can be wrong."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong, in a file and with some tensors, if it can be told with which."""

    kind: Kind
    message: str
    file: str | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Values:
    """Of one tensor's elements; of complex ones, of their real and imaginary parts.

    ``min`` to ``std`` are those of the finite elements (``nan`` if there are none), ``std`` over all of them, not a
    sample. ``digest`` is equal for equal values of tensors of one shape and dtype.
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
    """One tensor. ``shape`` in elements; ``dtype`` as torch names it, or the file, if torch does not know it.

    ``nbytes`` is what its elements take. ``files`` hold them, the first of them from byte ``offset`` on, if that can be
    told from headers. ``whole`` says whether all of them are there.
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
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file: its bytes in all, and how many tensors, taking how many of them, lie in it. ``None``: not there."""

    name: str
    nbytes: int | None
    tensors: int
    tensor_nbytes: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds. ``str()`` gives the gist of it, and all damage.

    Attributes:
        path: as it was asked for.
        format: in words.
        note: anything worth knowing of how it was read.
        tensors: in the file's own order.
        files: every file that belongs to it.
        entries: the state dicts in it, by the name that ``entry=`` takes (``""`` is the outermost), and their tensors.
        ties: tensors that share bytes in the file: the same weight under several names.
        duplicates: other tensors of equal values, constant ones left out; only if values were read.
        damage: what is wrong, empty for a sound checkpoint.
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
        """Whether no damage was found."""
        return not self.damage

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of ties counted once."""
        again = {key for tie in self.ties for key in tie[1:]}
        return sum(row.nbytes for row in self.tensors if row.key not in again)

    @property
    def numel(self) -> int:
        """Elements of all tensors, those of ties counted once."""
        again = {key for tie in self.ties for key in tie[1:]}
        return sum(row.numel for row in self.tensors if row.key not in again)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes of each dtype, the most first."""
        found: Counter[str] = Counter()
        for row in self.tensors:
            found[row.dtype] += row.nbytes
        return dict(found.most_common())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, fit for JSON; NaN and infinities as the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
        found = {"sound": self.sound, "numel": self.numel, "nbytes": self.nbytes, **asdict(self)}
        for row in found["tensors"]:
            if row["values"] is not None:
                row["values"] = {name: _json(value) for name, value in row["values"].items()}
        return found

    def __str__(self) -> str:
        dtypes = ", ".join(f"{nbytes:,} bytes of {dtype}" for dtype, nbytes in self.dtypes.items())
        head = f"{self.path}: {self.format}, {len(self.tensors)} tensors{': ' * bool(dtypes)}{dtypes}"
        damage = [f"{one.kind}: {one.file or self.path}: {one.message}" for one in self.damage]
        return "\n".join([head, *damage] if damage else [head, "sound"])


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
