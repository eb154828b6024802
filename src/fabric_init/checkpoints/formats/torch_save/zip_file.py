"""The container of ``torch.save``: a zip file of uncompressed records, in a file or in a part of one.

``zipfile`` reads the directory at the end. Where the data of a record begins is in the record's own header alone.
"""

from __future__ import annotations

import io
import zipfile
from typing import NamedTuple

import torch

from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.checkpoints.storage.read_ahead import Place

TAIL_BYTES = 1 << 16
_MOST_BYTES = 1 << 28
"""More than any directory takes: that of 100,000 tensors has 10 MB. A damaged one may ask for more."""

LOCAL_MAGIC = b"PK\3\4"
LOCAL_BYTES = 30
"""Bytes of a local header, before the name and the extra field; their lengths are its last four bytes."""
_USUAL_NAME_BYTES = 64


class LocalHeader(NamedTuple):
    """The header in front of a record."""

    name: str
    start: int
    """The first byte of the record's data."""


def local_header(file: FileBytes, at: int) -> LocalHeader | None:
    """Return the local header at byte ``at``; ``None`` if there is none."""
    head = bytes_at(file, at, LOCAL_BYTES + _USUAL_NAME_BYTES)
    if len(head) < LOCAL_BYTES or not head.startswith(LOCAL_MAGIC):
        return None
    name_length, extra_length = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    name = head[LOCAL_BYTES : LOCAL_BYTES + name_length]
    if name_length > _USUAL_NAME_BYTES:
        name = bytes_at(file, at + LOCAL_BYTES, name_length)
    return LocalHeader(name.decode(errors="replace"), at + LOCAL_BYTES + name_length + extra_length)


def bytes_at(file: FileBytes, start: int, count: int) -> bytes:
    """Return ``count`` bytes from ``start`` on; fewer where the file ends earlier."""
    stop = min(start + count, file.size)
    return file.part(start, stop) if start < stop else b""


def open_zip(file: FileBytes, *, tail_bytes: int = TAIL_BYTES) -> zipfile.ZipFile:
    """Read the directory of a zip file.

    Args:
        file: the file.
        tail_bytes: how much to read at once at the end, where the directory is.

    Raises:
        zipfile.BadZipFile: there is no directory, or a damaged one.
    """
    return zipfile.ZipFile(_Readable(file, tail_bytes))


class FilePart:
    """A part of a file as a :class:`~fabric_init.checkpoints.storage.local.FileBytes`."""

    def __init__(self, file: FileBytes, offset: int, length: int) -> None:
        if offset + length > file.size:
            raise ValueError(f"the file has only {file.size:,} bytes")
        self.path, self.size = file.path, length
        self._file, self._offset = file, offset

    def place(self, start: int, stop: int) -> Place:
        return self._file.place(self._offset + start, self._offset + stop)

    def head(self, stop: int) -> bytes:
        return self.part(0, min(stop, self.size))

    def part(self, start: int, stop: int) -> bytes:
        return self._file.part(self._offset + start, self._offset + stop)

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        return self._file.tensor(dtype, self._offset + offset, window)


class _Readable(io.RawIOBase):
    """A file object for ``zipfile``, which reads at the end a few bytes at a time: that part is read once."""

    def __init__(self, file: FileBytes, tail_bytes: int) -> None:
        self._file, self._at = file, 0
        self._tail_start = max(0, file.size - tail_bytes)
        self._tail = file.part(self._tail_start, file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the start of the file")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        count = max(0, self._file.size - self._at) if size is None or size < 0 else size
        if min(count, self._file.size - self._at) > _MOST_BYTES:
            raise zipfile.BadZipFile(f"its directory asks for {count:,} bytes")
        if self._at >= self._tail_start:
            data = self._tail[self._at - self._tail_start :][:count]
        else:
            data = bytes_at(self._file, self._at, count)
        self._at += len(data)
        return data
