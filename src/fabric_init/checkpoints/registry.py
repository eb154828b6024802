"""What a format is, for those that are known and those that users register: how it is recognized and opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, TensorSpec
from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.local import Opener, open_bytes
from fabric_init.checkpoints.storage.manifest import Manifest
from fabric_init.checkpoints.storage.remote import AnyPath, RemotePath, as_path, is_url
from fabric_init.errors import CheckpointFormatError

_HEAD_BYTES = 64


class Candidate:
    """A path, URL or model id to open. The disk or the network is not touched before an attribute is looked at."""

    def __init__(
        self,
        location: str | os.PathLike[str] | RemotePath,
        *,
        mmap: bool = True,
        manifest: Manifest | None = None,
        entry: str | None = None,
        origin: str | None = None,
    ) -> None:
        self._location = location
        self.asked = str(location) if isinstance(location, RemotePath) else os.fspath(location)
        """The argument of the user, as text."""
        self.mmap = mmap
        self.manifest = manifest
        self.entry = entry
        """The state dict that is meant, where there are several."""
        self.origin = origin
        """The model id and commit that it was fetched from."""

    def at(self, path: AnyPath, origin: str | None = None) -> Candidate:
        """Return a candidate for another path, the file to open in a folder, say, with the same options."""
        origin = origin or self.origin
        return Candidate(path, mmap=self.mmap, manifest=self.manifest, entry=self.entry, origin=origin)

    @property
    def opener(self) -> Opener | None:
        """Opens files and checks them against the manifest; ``None`` without a manifest."""
        return None if self.manifest is None else self.manifest.opener(mmap=self.mmap)

    @property
    def is_url(self) -> bool:
        """Whether it is a URL for fsspec."""
        return isinstance(self._location, RemotePath) or (isinstance(self._location, str) and is_url(self._location))

    @cached_property
    def path(self) -> AnyPath:
        """The path or URL."""
        return as_path(self._location)

    @cached_property
    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.path.is_dir()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sorted names of the files in the folder; none of a file."""
        if not self.is_dir:
            return ()
        if isinstance(self.path, RemotePath):
            return self.path.names()
        return tuple(sorted(entry.name for entry in self.path.iterdir() if not entry.is_dir()))

    @cached_property
    def head(self) -> bytes:
        """The first 64 bytes of the file; none of a folder."""
        return b"" if self.is_dir else open_bytes(self.path, mmap=False).head(_HEAD_BYTES)

    def refuse_entry(self) -> None:
        """Raise if ``entry`` is set, for formats with one state dict."""
        if self.entry is not None:
            raise CheckpointFormatError(f"{self.path} holds a single state dict; remove entry={self.entry!r}.")

    def check_files(self) -> None:
        """Compare every file with the manifest, if there is one: for readers that open files by themselves."""
        if self.manifest is None:
            return
        if not isinstance(self.path, Path):
            raise ValueError(f"what this format reads at {self.path} cannot be compared with a manifest")
        if self.is_dir:
            self.manifest.check_folder(self.path)
        else:
            self.manifest.check(self.path)


@dataclass(frozen=True, slots=True)
class Format:
    """One checkpoint format."""

    name: str
    recognizes: Callable[[Candidate], bool]
    open: Callable[[Candidate], CheckpointReader]


@dataclass(frozen=True, slots=True)
class Way:
    """Something that leads to a checkpoint, such as a folder to a file in it."""

    name: str
    recognizes: Callable[[Candidate], bool]
    follow: Callable[[Candidate], Candidate]


_registered: list[Format] = []


def register_reader(name: str, recognizes: Callable[[Candidate], bool], opens: Callable[..., CheckpointReader]) -> None:
    """Register a format of your own with :func:`~fabric_init.checkpoints.open_checkpoint`, and so everywhere.

    Registered formats are asked before the known ones, the latest first; the same name again replaces the earlier one.
    With ``manifest=``, all files are compared with it before the reader opens them.

    Args:
        name: what it is, in words; for :func:`unregister_reader`.
        recognizes: whether a :class:`Candidate` is of this format: by what was asked for, its path, its first bytes or,
            for a folder, the names in it.
        opens: ``opens(path, mmap=...)`` returns a :class:`~fabric_init.checkpoints.CheckpointReader`; a class with such
            a constructor will do. ``path`` is a :class:`~pathlib.Path`; for a URL it is text.
    """
    if not callable(recognizes) or not callable(opens):
        raise TypeError("register_reader needs two functions: recognizes(candidate) and opens(path, mmap=...)")

    def open_own(candidate: Candidate) -> CheckpointReader:
        candidate.refuse_entry()
        candidate.check_files()
        reader = opens(candidate.asked if candidate.is_url else candidate.path, mmap=candidate.mmap)
        return reader if hasattr(reader, "extra_state") else _WithoutExtraState(reader)

    unregister_reader(name)
    _registered.insert(0, Format(name, recognizes, open_own))


class _WithoutExtraState(BaseReader):
    """A registered reader that leaves out the optional member of the protocol."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.path, self.format, self.note = reader.path, reader.format, reader.note
        self._reader = reader

    def keys(self) -> Sequence[str]:
        return self._reader.keys()

    def spec(self, key: str) -> TensorSpec:
        return self._reader.spec(key)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        return self._reader.read(key, region)


def unregister_reader(name: str) -> None:
    """Remove a registered format; do nothing if there is none of that name."""
    _registered[:] = [format for format in _registered if format.name != name]


def registered_formats() -> tuple[Format, ...]:
    """Return the registered formats, the latest first."""
    return tuple(_registered)
