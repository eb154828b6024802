"""What the look at one format gives: tensors, where their elements are, and what is wrong with the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fabric_init.tools.inspect.contents import Damage


class Run(NamedTuple):
    """Elements that are read together, in the order of the file."""

    numel: int
    read: Callable[[int, int], torch.Tensor]
    """Elements ``start:stop`` of it, 1-D."""


@dataclass(slots=True)
class Found:
    """One tensor of the header."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    files: dict[str, int]
    """What holds it, and how many of its bytes each."""
    extent: tuple[int, int] | None = None
    """First byte and the one after the last, in its only file; ``None`` if it lies in several places, or unknown."""
    runs: tuple[Run, ...] = ()
    """Its elements, if they are all there."""
    layout: object = None
    """What else decides on their order, if it is not row-major: bytes are equal values only in equal layouts."""
    whole: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(slots=True)
class Survey:
    """All that a header says."""

    format: str
    found: list[Found] = field(default_factory=list)
    files: dict[str, int | None] = field(default_factory=dict)
    """Name -> bytes; ``None`` of a file that is not there."""
    damage: list[Damage] = field(default_factory=list)
    ties: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)
    readable: bool = True
    """Whether our own reader should open it, without reading weights."""


def sharing_bytes(found: Iterable[Found]) -> Iterator[tuple[Found, ...]]:
    """Groups of tensors with extents in one file that overlap; empty tensors share nothing."""
    by_file: dict[tuple[str, ...], list[tuple[int, int, Found]]] = {}
    for one in found:
        if one.extent is not None and one.extent[0] < one.extent[1]:
            by_file.setdefault(tuple(one.files), []).append((*one.extent, one))
    for extents in by_file.values():
        group: list[Found] = []
        reach = 0
        for start, stop, one in sorted(extents, key=lambda extent: extent[0]):
            if start >= reach and group:
                yield from [tuple(group)] if len(group) > 1 else []
                group = []
            group.append(one)
            reach = max(reach, stop)
        if len(group) > 1:
            yield tuple(group)
