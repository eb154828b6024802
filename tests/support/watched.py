"""See what a rank reads, and let things happen at a certain read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fabric_init.checkpoints import CheckpointReader, Region, open_checkpoint
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.reader import fields_of
from fabric_init.planning import checkpoint_source as source


class Watched:
    """A reader that keeps a list of what was read, and may do something first."""

    def __init__(self, reader: CheckpointReader, before_read: Callable[[int], None] = lambda count: None) -> None:
        self._reader = reader
        self._before_read = before_read
        self.parts: list[tuple[str, Region | None]] = []
        self.path, self.format, self.note = reader.path, reader.format, reader.note
        self.keys, self.spec, self.extra_state = reader.keys, reader.spec, reader.extra_state
        self.fields = fields_of(reader)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        self._before_read(len(self.parts))
        self.parts.append((key, region))
        return self._reader.read(key, region)


def watched(before_read: Callable[[int], None] = lambda count: None) -> list[Watched]:
    """From now on this process opens checkpoints like that; gives those that it has open."""
    opened: list[Watched] = []

    def open_it(path: Path, **options: Any) -> Watched:
        opened.append(Watched(open_checkpoint(path, **options), before_read))
        return opened[-1]

    source.open_checkpoint = open_it  # type: ignore[assignment]
    return opened


@contextmanager
def bytes_read() -> Iterator[Callable[[], int]]:
    """Context that counts what this process reads of safetensors files; yields how many bytes these are so far."""
    sizes: list[int] = []
    plain_read = SafetensorsReader.read

    def read(self: SafetensorsReader, key: str, region: Region | None = None) -> Tensor:
        value = plain_read(self, key, region)
        sizes.append(value.nbytes)
        return value

    SafetensorsReader.read = read  # type: ignore[method-assign]
    try:
        yield lambda: sum(sizes)
    finally:
        SafetensorsReader.read = plain_read  # type: ignore[method-assign]
