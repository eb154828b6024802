"""Several checkpoints that together fill one model, as a single reader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, places
from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.read_ahead import Place


class CombinedReader(BaseReader):
    """A :class:`~fabric_init.checkpoints.reader.CheckpointReader` over others.

    Keys of the first reader stay as they are; those of the others have their path in front, and a number where several
    read one path, converted or renamed each in its own way.
    """

    def __init__(self, readers: Sequence[CheckpointReader]) -> None:
        self._readers = list({id(reader): reader for reader in readers}.values())
        its_paths = [str(reader.path) for reader in self._readers]
        self._labels = {
            id(reader): f"{path} ({again + 1})" if (again := its_paths[1:index].count(path)) else path
            for index, (reader, path) in enumerate(zip(self._readers, its_paths, strict=True))
        }
        self._homes = {self.key(reader, key): (reader, key) for reader in self._readers for key in reader.keys()}
        self.specs = {key: reader.spec(own) for key, (reader, own) in self._homes.items()}
        paths = dict.fromkeys(its_paths)
        notes = dict.fromkeys(reader.note for reader in self._readers if reader.note)
        self.path, self.format = Path(" + ".join(paths)), self._readers[0].format
        self.note = "; ".join(notes) or None

    def __len__(self) -> int:
        """Return the number of readers."""
        return len(self._readers)

    def key(self, reader: CheckpointReader, key: str) -> str:
        """Return the key in this reader for ``key`` of one of the readers."""
        return key if reader is self._readers[0] else f"{self._labels[id(reader)]}: {key}"

    def read(self, key: str, region: Region | None = None) -> Tensor:
        self.spec(key)
        reader, own = self._homes[key]
        return reader.read(own, region)

    def places(self, key: str, region: Region | None = None) -> Iterable[Place]:
        reader, own = self._homes[key]
        return places(reader, own, region)
