"""The survey of one checkpoint: its tensors, the location of their elements, and its damage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fabric_init.tools.inspect.contents import Damage


class ElementRun(NamedTuple):
    """Contiguous elements of a file, in file order."""

    numel: int
    read: Callable[[int, int], torch.Tensor]
    """Return elements ``start:stop`` as a 1-D tensor."""


@dataclass(slots=True)
class SurveyedTensor:
    """One tensor of a header."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    files: dict[str, int]
    """The files that hold it, and its bytes in each."""
    extent: tuple[int, int] | None = None
    """First byte and the one after the last, in its only file; ``None`` if it is scattered or unknown."""
    runs: tuple[ElementRun, ...] = ()
    """Its elements, if the files have all of them."""
    layout: object = None
    """The memory order of the elements if it is not row-major: equal bytes are equal values only in equal layouts."""
    whole: bool = True

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(slots=True)
class Survey:
    """The content of a header."""

    format: str
    found: list[SurveyedTensor] = field(default_factory=list)
    files: dict[str, int | None] = field(default_factory=dict)
    """Name to bytes; ``None`` for a missing file."""
    damage: list[Damage] = field(default_factory=list)
    ties: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)
    readable: bool = True
    """Whether the reader of the format should be able to open it."""


def sharing_bytes(tensors: Iterable[SurveyedTensor]) -> Iterator[tuple[SurveyedTensor, ...]]:
    """Yield groups of tensors whose extents in one file overlap; empty tensors share nothing."""
    by_file: dict[tuple[str, ...], list[tuple[int, int, SurveyedTensor]]] = {}
    for tensor in tensors:
        if tensor.extent is not None and tensor.extent[0] < tensor.extent[1]:
            by_file.setdefault(tuple(tensor.files), []).append((*tensor.extent, tensor))
    for extents in by_file.values():
        group: list[SurveyedTensor] = []
        reach = 0
        for start, stop, tensor in sorted(extents, key=lambda extent: extent[0]):
            if start >= reach and group:
                yield from [tuple(group)] if len(group) > 1 else []
                group = []
            group.append(tensor)
            reach = max(reach, stop)
        if len(group) > 1:
            yield tuple(group)
