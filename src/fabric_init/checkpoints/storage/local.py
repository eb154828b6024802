"""The bytes of one file as tensors: mapped into memory, copied out by plain reads, or fetched from a URL.

All know nothing of formats. A format's reader finds out where a tensor lies and asks for a window of it.
"""

from __future__ import annotations

import mmap as _mmap
import os
import stat
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch

from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.storage.read_ahead import GAP_BYTES, Place
from fabric_init.checkpoints.storage.remote import AnyPath, RemoteBytes, RemotePath
from fabric_init.checkpoints.storage.strided_window import gather, memory, runs
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError, OutOfMemoryError, is_out_of_memory

# Without it Linux refuses a private writable map larger than memory plus swap, although most of it is never written.
# Python 3.11 lacks the name; the number is the one of x86, Arm and RISC-V.
_MAP_NORESERVE: int = getattr(_mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# Runs shorter than this are read together with the gap between them: one system call costs about as much as this copy.
_GATHER_BYTES = 1 << 20

MAPPED_FILES = 512
"""How many files to map at most: a map holds a descriptor, and a process may often have no more than 1,024."""


class FileBytes(Protocol):
    """The bytes of one open file; every method may be called from any thread."""

    @property
    def path(self) -> AnyPath:
        """Where it is; error messages name it."""
        ...

    size: int
    """Bytes in the file when it was opened."""

    def place(self, start: int, stop: int) -> Place:
        """Return where bytes ``start:stop`` are read from, to read them ahead."""
        ...

    def head(self, stop: int) -> bytes:
        """Return the first ``stop`` bytes; fewer when the file is shorter."""
        ...

    def part(self, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop``.

        Raises:
            CheckpointFormatError: they are not there.
        """
        ...

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        """Return the ``window`` (in elements) of a row-major tensor whose first byte lies at ``offset``, on the CPU.

        Raises:
            CheckpointFormatError: the file no longer holds those bytes.
        """
        ...


Opener = Callable[[AnyPath], FileBytes]
"""How a reader gets at the bytes of a file: :func:`open_bytes`, or one that checks them on the way."""


def open_bytes(path: AnyPath, *, mmap: bool) -> FileBytes:
    """Open a regular file: mapped privately (zero copy, copy on write), or for plain reads that copy.

    A file at a URL is read by requests for the needed parts.

    Raises:
        CheckpointNotFoundError: it is missing.
        CheckpointFormatError: it is a folder, a pipe, empty or not readable.
        OutOfMemoryError: there is no address space for the map.
    """
    if isinstance(path, RemotePath):
        return RemoteBytes(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            # Asked before open(): opening a pipe would wait for a writer.
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise CheckpointFormatError(f"{path} is {what}; expected a checkpoint file.")
        with FileIO(path) as file:
            status = os.fstat(file.fileno())
            if not status.st_size:
                raise CheckpointFormatError(f"{path} is empty (0 bytes): fetch or save it again.")
            return _Mapped(path, file, status) if mmap else _Plain(path, status)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointFormatError):
            raise
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"{path}: there is no address space for a map of the file ({error}). Raise the limit (ulimit -v), or "
                "read it without a map: mmap=False."
            ) from error
        raise CheckpointFormatError(f"{path} cannot be read: {error}. Check its permissions and path.") from error


def places_of_window(file: FileBytes, dtype: torch.dtype, offset: int, window: Window) -> Iterator[Place]:
    """Yield where :meth:`FileBytes.tensor` reads, for the same arguments."""
    size = dtype.itemsize
    for start, stop in runs(window, GAP_BYTES // size):
        yield file.place(offset + start * size, offset + stop * size)


class _Local:
    """What both ways to a local file have in common."""

    mapped: bool

    def __init__(self, path: Path, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self._identity = identity(status)

    def place(self, start: int, stop: int) -> Place:
        return Place(self, start, stop)


class _Mapped(_Local):
    """A private copy-on-write map: tensors are views of it, and writes to them stay in this process.

    [Note: private copy-on-write maps]
    A tensor of the map can become a parameter without a copy. A page is read from the file at its first access, and is
    copied by the kernel at the first write (an optimizer step), so the file never changes. The price: the file must not
    change either while the map lives. One that is written in place changes weights that were not yet written to, and
    one that is cut short ends the process with SIGBUS. So each read compares the file's identity with that at opening.
    A new file that is renamed over the old one does no harm: the map keeps the old one.

    Each tensor gets a storage of its own, exactly as long as its window: code that compares storages (tied weights,
    ``torch.save``) sees what it would see after a copy.
    """

    mapped = True

    def __init__(self, path: Path, file: FileIO, status: os.stat_result) -> None:
        super().__init__(path, status)
        size = self.size
        if sys.platform == "win32":
            self._map = _mmap.mmap(file.fileno(), size, access=_mmap.ACCESS_COPY)
        else:
            flags = _mmap.MAP_PRIVATE | _MAP_NORESERVE
            self._map = _mmap.mmap(file.fileno(), size, flags=flags, prot=_mmap.PROT_READ | _mmap.PROT_WRITE)

    def head(self, stop: int) -> bytes:
        return self._map[:stop]

    def part(self, start: int, stop: int) -> bytes:
        self._check(stop)
        return self._map[start:stop]

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        count = window.extent
        if not count:
            return torch.empty(window.sizes, dtype=dtype, device="cpu")
        size = dtype.itemsize
        start = offset + window.start * size
        self._check(start + count * size)
        if start % size:
            # Legal in old safetensors files and usual in those of torch.distributed.checkpoint. Kernels may assume
            # alignment, so this one is a copy, of no more than the window.
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * size, offset=start)
            strides = (*(stride * size for stride in window.strides), 1)
            copy = raw.as_strided((*window.sizes, size), strides).clone(memory_format=torch.contiguous_format)
            return copy.view(dtype).view(window.sizes).detach()
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)
        # detach() drops the autograd view record: the result becomes a parameter, which must not be a view.
        return flat.as_strided(window.sizes, window.strides).detach()

    def _check(self, stop: int) -> None:
        try:
            now = identity(os.stat(self.path))
        except OSError:
            now = ()  # removed, or out of reach: the map keeps what was there, unless somebody else cuts it short
        # A file that was put in its place does not concern the map.
        is_there = now[:2] == self._identity[:2]
        if stop > self.size or (now != self._identity if is_there else self._map.size() < self.size):
            # Touching a page past the end would kill the process with SIGBUS.
            raise CheckpointFormatError(changed(self.path, self.size))


class _Plain(_Local):
    """Plain reads into new memory. What was read stays if the file changes; a change between open and read is seen."""

    mapped = False

    def head(self, stop: int) -> bytes:
        with FileIO(self.path) as file:
            data = bytearray(min(stop, self.size))
            _read_into(file, 0, memoryview(data), self)
            return bytes(data)

    def part(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        try:
            with FileIO(self.path) as file:
                _read_into(file, start, memoryview(data), self)
                self._check_unchanged(file)
        except OSError as error:
            raise CheckpointFormatError(f"{self.path} can no longer be read: {error}.") from error
        return bytes(data)

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        out = torch.empty(window.sizes, dtype=dtype, device="cpu")
        if not out.numel():
            return out
        try:
            # Opened anew each time: no lock between threads, no descriptor held open.
            with FileIO(self.path) as file:

                def read_run(target: torch.Tensor, start: int) -> None:
                    _read_into(file, offset + start * dtype.itemsize, memory(target), self)

                gather(out, window, read_run, _GATHER_BYTES)
                self._check_unchanged(file)
        except OSError as error:
            raise CheckpointFormatError(f"{self.path} can no longer be read: {error}.") from error
        return out

    def _check_unchanged(self, file: FileIO) -> None:
        if identity(os.fstat(file.fileno())) != self._identity:
            raise CheckpointFormatError(changed(self.path, self.size))


def _read_into(file: FileIO, start: int, target: memoryview, source: FileBytes) -> None:
    file.seek(start)
    while target:
        # One call returns at most about 2 GiB.
        got = file.readinto(target)
        if not got:
            raise CheckpointFormatError(changed(source.path, source.size))
        target = target[got:]


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to."""
    # No tool sets the ctime back: a copy into the file that keeps its old mtime shows there.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changed(path: AnyPath, size: int) -> str:
    """Return the error message for a file that was changed."""
    return (
        f"{path} changed after it was opened (it held {size:,} bytes then). Open it again; save a new checkpoint "
        f"beside the old one and rename it, rather than over it."
    )
