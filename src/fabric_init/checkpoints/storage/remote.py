"""Files at URLs, through fsspec: ``https://``, ``s3://``, ``memory://`` and what else it knows.

:class:`RemotePath` has the few things of a :class:`~pathlib.Path` that the readers ask for, :class:`RemoteBytes` is the
third way to the bytes of a file beside the two of :mod:`~fabric_init.checkpoints.storage.local`. Every read asks for
just the bytes of its region; parts with small gaps between them are requested together, large ones in several requests
at once.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.storage.http import ChangedError, HTTPFile, WrongAnswerError, explained
from fabric_init.checkpoints.storage.read_ahead import GAP_BYTES, PIECE_BYTES, REQUESTS, Place, ReadAhead
from fabric_init.checkpoints.storage.strided_window import is_dense, memory
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")

_FILES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt")
# What a web server is asked for under a URL that names no file. (fsspec would fetch the page and look for links in it.)
_USUAL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_ONE_AT_A_TIME = threading.Lock()
"""For file systems that are not asynchronous: that of FTP, say, has one connection, where answers would be mixed up."""


def is_url(text: str) -> bool:
    """Return whether this is a URL for fsspec: ``scheme://…`` or a chain ``cache::scheme://…``."""
    return _URL.match(text) is not None


class RemotePath:
    """A file or folder at a URL.

    Raises:
        CheckpointFormatError: fsspec, or what it needs for this scheme, is missing.
    """

    def __init__(self, url: str, filesystem: Any = None) -> None:
        self._url = url
        if filesystem is None:
            try:
                from fsspec.core import url_to_fs

                filesystem, _ = url_to_fs(url)
            except Exception as error:  # ImportError names the package to install, ValueError the unknown scheme
                raise CheckpointFormatError(f"{self} cannot be opened with fsspec: {error}.") from error
        self.filesystem = filesystem
        self.location = str(filesystem._strip_protocol(url))
        """The path as the file system wants it."""

    def __str__(self) -> str:
        # What signs a request is a secret: error messages end up in logs.
        return re.sub(r"//[^/@]*@", "//", self._url.partition("?")[0])

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url.partition('?')[0].rstrip('/')}/{name}", self.filesystem)

    @property
    def name(self) -> str:
        return self._url.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        dot = self.name.rfind(".")
        return self.name[dot:] if dot > 0 else ""

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._url.partition("?")[0].rstrip("/").rpartition("/")[0], self.filesystem)

    @property
    def lists_folders(self) -> bool:
        """Whether the file system has folders; web servers have none."""
        return urlsplit(self._url).scheme not in ("http", "https")

    def exists(self) -> bool:
        """Return whether there is a file or folder."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is a file; of a web server, whether it answers."""
        try:
            with _errors_of(self):
                # Not exists(): of a web server that asks for the whole file.
                return bool(self.filesystem.info(self.location)["type"] == "file")
        except CheckpointNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Return whether there is a folder; of a web server, whether a usual file of a checkpoint is under this URL."""
        if not self.lists_folders:
            return self.suffix not in _FILES and bool(self.names())
        with _errors_of(self):
            return bool(self.filesystem.isdir(self.location))

    def names(self) -> tuple[str, ...]:
        """Return the sorted names of the files in this folder; of a web server, which usual ones it has."""
        if not self.lists_folders:
            return tuple(name for name in _USUAL if (self / name).is_file())
        with _errors_of(self):
            entries = self.filesystem.ls(self.location, detail=True)
        return tuple(sorted(str(entry["name"]).rpartition("/")[2] for entry in entries if entry["type"] == "file"))


AnyPath = Path | RemotePath


def as_path(path: str | os.PathLike[str] | AnyPath) -> AnyPath:
    """Return a path on this machine, or a URL, for what a user passed."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(path) if isinstance(path, str) and is_url(path) else Path(path).expanduser()


class RemoteBytes:
    """The bytes of a remote file; a :class:`~fabric_init.checkpoints.storage.local.FileBytes`.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointFormatError: it cannot be read, or not in parts.
    """

    mapped = False

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self.ahead: ReadAhead | None = None
        self._http = None if path.lists_folders else HTTPFile(path.filesystem, path.location)
        if self._http is not None:
            with _errors_of(path):
                self.size = self._http.open().size
        else:
            details = self._details()
            if details.get("type") == "directory":
                raise CheckpointFormatError(f"{path} is a folder; expected a checkpoint file.")
            size = details.get("size")
            if not isinstance(size, int):
                raise CheckpointFormatError(f"{path} cannot be read: its size is not known.")
            self.size = size
            self._version = _version_of(details)
        if not self.size:
            raise CheckpointFormatError(f"{path} is empty (0 bytes): fetch or save it again.")

    @property
    def version(self) -> str:
        """What tells this version of the file from others."""
        return repr(self._version if self._http is None else self._http.version)

    def head(self, stop: int) -> bytes:
        return bytes(self._fetch([(0, min(stop, self.size))])[0])

    def part(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        self._read_into([(start, memoryview(data))])
        return bytes(data)

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        out = torch.empty(window.sizes, dtype=dtype, device="cpu")
        if not out.numel():
            return out
        parts, size = list(_parts(out, window)), dtype.itemsize
        for first in range(0, len(parts), REQUESTS):
            batch = parts[first : first + REQUESTS]
            runs = [target if w.extent == target.numel() else target.new_empty(w.extent) for target, w in batch]
            starts = [offset + w.start * size for _, w in batch]
            self._read_into([(start, memory(run)) for start, run in zip(starts, runs, strict=True)])
            for (target, wanted), run in zip(batch, runs, strict=True):
                if run is not target:
                    target.copy_(run.as_strided(wanted.sizes, wanted.strides))
        return out

    def place(self, start: int, stop: int) -> Place:
        return Place(self, start, stop)

    def request(self, start: int, stop: int, buffer: bytearray) -> bytes | memoryview:
        """Return bytes ``start:stop``, by a request of their own, perhaps in the memory of ``buffer``."""
        return self._fetch([(start, stop)], buffer)[0]

    def _read_into(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill memory with the bytes from each start on: with what was requested ahead, else by requests at once."""
        ahead = self.ahead
        lacking = [each for each in wanted if ahead is None or not ahead.take(self, *each)]
        if lacking:
            ranges = [(start, start + len(target)) for start, target in lacking]
            for (_, target), data in zip(lacking, self._fetch(ranges), strict=True):
                target[:] = data

    def _fetch(self, ranges: list[tuple[int, int]], buffer: bytearray | None = None) -> Sequence[bytes | memoryview]:
        """Return these byte ranges, requested concurrently where the file system can."""
        with _errors_of(self.path, self.size):
            if self._http is not None:
                parts: Sequence[bytes | memoryview] = self._http.fetch(ranges, buffer)
            else:
                starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
                places = [self.path.location] * len(ranges)
                with nullcontext() if self.path.filesystem.async_impl else _ONE_AT_A_TIME:
                    parts = self.path.filesystem.cat_ranges(places, starts, stops, on_error="raise")
                    if _version_of(self._details()) != self._version:
                        raise ChangedError
        for (start, stop), data in zip(ranges, parts, strict=True):
            if len(data) != stop - start:
                raise CheckpointFormatError(
                    f"{self.path} answered with {len(data):,} bytes for {stop - start:,} from {start:,} on. "
                    f"Did it change meanwhile?"
                )
        return parts

    def _details(self) -> dict[str, Any]:
        """Ask the file system anew; some remember what they have listed."""
        with _errors_of(self.path):
            self.path.filesystem.invalidate_cache()
            details: dict[str, Any] = self.path.filesystem.info(self.path.location)
            return details


def _version_of(details: dict[str, Any]) -> tuple[str, ...]:
    """Return what changes when a file at a URL is written anew, as far as its file system says."""
    names = (
        "size",
        "ETag",
        "etag",
        "md5Hash",
        "generation",
        "LastModified",
        "last_modified",
        "mtime",
        "created",
        "ino",
    )
    return tuple(f"{name}={details[name]}" for name in names if name in details)


def _parts(out: torch.Tensor, window: Window) -> Iterator[tuple[torch.Tensor, Window]]:
    """Cut a window into pieces for one request each, with the parts of ``out`` that they fill."""
    size = out.element_size()
    if window.extent * size <= PIECE_BYTES and is_dense(window, GAP_BYTES // size):
        yield out, window
        return
    dim = next(dim for dim, count in enumerate(window.sizes) if count > 1)
    half = window.sizes[dim] // 2
    for first, count in ((0, half), (half, window.sizes[dim] - half)):
        sizes = (*window.sizes[:dim], count, *window.sizes[dim + 1 :])
        part = Window(window.start + first * window.strides[dim], sizes, window.strides)
        yield from _parts(out.narrow(dim, first, count), part)


def _connection_error(error: FileNotFoundError) -> OSError | None:
    """Return the error of a connection, of which fsspec says, too, that there is no such file."""
    cause = error.__cause__
    while isinstance(cause, FileNotFoundError):
        cause = cause.__cause__
    return cause if isinstance(cause, OSError) else None


class _errors_of:
    """Turn errors of a file system or network into ours, which name the URL."""

    def __init__(self, path: RemotePath, size: int = 0) -> None:
        self._path = path
        self._size = size

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FileNotFoundError) and (unreachable := _connection_error(error)) is not None:
            raise CheckpointFormatError(f"{self._path} cannot be reached: {unreachable}.") from error
        if isinstance(error, FileNotFoundError) and not isinstance(error, CheckpointNotFoundError):
            raise CheckpointNotFoundError(f"{self._path} does not exist.") from error
        if isinstance(error, WrongAnswerError):
            raise explained(self._path, error, self._size) from error
        if isinstance(error, Exception) and not isinstance(error, (CheckpointFormatError, CheckpointNotFoundError)):
            reason = str(error).strip()[:300] or type(error).__name__
            raise CheckpointFormatError(f"{self._path} cannot be read: {reason}.") from error
