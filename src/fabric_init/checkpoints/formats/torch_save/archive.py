"""A file of ``torch.save`` read through any :class:`~fabric_init.checkpoints.storage.local.FileBytes`.

``torch.load`` would believe whatever sizes the pickle gives, read all that cannot be mapped, and not see that a mapped
file changes. Here only the zip directory and the pickle are read. The pickle goes through torch's own ``weights_only``
unpickler, with storages on the meta device in the place of those in the file; a tensor's values are then read where its
record lies.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import (
    Unpickler,
    _get_allowed_globals,
    _get_user_allowed_globals,
    get_globals_in_pkl,
)
from torch.utils._pytree import tree_map_only

from fabric_init.checkpoints.formats.pickles.limits import check_calls
from fabric_init.checkpoints.region import Region, Span, Window, take
from fabric_init.checkpoints.storage.local import FileBytes

_TAIL_BYTES = 1 << 16
_LOCAL_HEADER_BYTES = 30


class TorchArchive:
    """One zip file of ``torch.save``: opened for its directory and pickle, then :meth:`load`, then :meth:`read`.

    All raise ``zipfile.BadZipFile``, ``pickle.UnpicklingError`` or any other exception for what is no such file.
    """

    def __init__(self, file: FileBytes) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(Readable(file))
        names = [name for name in self._zip.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise zipfile.BadZipFile("it has no single data.pkl, so torch.save did not write it")
        self._prefix = names[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in self._zip.namelist() and self._read("byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        self._storages: dict[int, tuple[torch.UntypedStorage, zipfile.ZipInfo]] = {}
        self._typed: dict[tuple[str, torch.dtype], torch.storage.TypedStorage] = {}
        self._starts: dict[str, int] = {}
        self.pickle = self._read("data.pkl")

    def load(self) -> Any:
        """What was given to ``torch.save``, its tensors on the meta device."""
        check_calls(self.pickle, self._file.size)
        return load_meta(io.BytesIO(self.pickle), self.storage)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values are in this file; one that was saved from the meta device has none."""
        return tensor.is_meta and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._storages

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Whether its last element lies in its storage. On the meta device torch lets a storage grow instead."""
        extent = Window(0, tuple(tensor.shape), tensor.stride()).extent
        record = self._storages[tensor.untyped_storage()._cdata][1]
        return (int(tensor.storage_offset()) + extent) * tensor.element_size() <= record.file_size or not extent

    def read(self, tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
        """A region of one of the tensors that :meth:`load` gave."""
        start = self._start(self._storages[tensor.untyped_storage()._cdata][1]) if tensor.numel() else 0
        return read_region(self._file, start, tensor, region)

    def with_values(self, content: Any) -> Any:
        """A part of what :meth:`load` gave, with its tensors read."""
        return tree_map_only(torch.Tensor, lambda t: self.read(t, None) if self.holds(t) else t, content)

    def storage(self, dtype: torch.dtype, key: str, count: int) -> torch.storage.TypedStorage:
        """The storage of one record, without its values."""
        known = self._typed.get((key, dtype))
        if known is not None:
            return known
        record = self._zip.getinfo(f"{self._prefix}data/{key}")
        # torch never compresses; a record that lies about its size would give bytes of its neighbor
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != count * dtype.itemsize:
            raise zipfile.BadZipFile(f"the record of storage {key} has not the size that the pickle gives")
        untyped = torch.UntypedStorage(record.file_size, device="meta")
        self._storages[untyped._cdata] = untyped, record
        typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._typed.setdefault((key, dtype), typed)

    def _start(self, record: zipfile.ZipInfo) -> int:
        """The first byte of a record; its own header says how long it is itself, the directory does not."""
        if record.filename not in self._starts:
            header = _part(self._file, record.header_offset, record.header_offset + _LOCAL_HEADER_BYTES)
            if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(b"PK\3\4"):
                raise zipfile.BadZipFile(f"there is no header of the record {record.filename} where it should be")
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            start = record.header_offset + _LOCAL_HEADER_BYTES + lengths
            if start + record.file_size > self._file.size:
                raise zipfile.BadZipFile(f"the record {record.filename} sticks out of the file")
            self._starts[record.filename] = start
        return self._starts[record.filename]

    def _read(self, name: str) -> bytes:
        record = self._zip.getinfo(self._prefix + name)
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > self._file.size:
            raise zipfile.BadZipFile(f"{name} is compressed, so torch.save did not write it")
        return self._zip.read(record)


def load_within(file: FileBytes, offset: int, length: int) -> Any:
    """What was given to ``torch.save``, which has put it into these bytes of a file. Raises as the archive does."""
    archive = TorchArchive(_Within(file, offset, length))
    return archive.with_values(archive.load())


def unsafe_globals(pickle: bytes) -> list[str]:
    """What a pickle names that ``weights_only`` refuses."""
    try:
        found = set(get_globals_in_pkl(io.BytesIO(pickle)))
    except Exception:  # corrupt as well: the caller reports the first error
        return []
    return sorted(found - _get_allowed_globals().keys() - _get_user_allowed_globals().keys())


Storages = Callable[[torch.dtype, str, int], torch.storage.TypedStorage]
"""What takes the place of a storage in the file, by its dtype, its key and the number of its elements."""


def load_meta(pickle: BinaryIO, storages: Storages, *, legacy: bool = False) -> Any:
    """Load a pickle of ``torch.save`` as ``weights_only=True`` does, its tensors on storages that are given."""
    unpickler = _Unpickler(pickle, encoding="utf-8")
    unpickler.storages, unpickler.legacy = storages, legacy
    try:
        return unpickler.load()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise ValueError("it has quantized tensors in it, which cannot be read: dequantize them first") from error


class _Unpickler(Unpickler):
    storages: Storages
    legacy: bool

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        # In the legacy format a sixth says which view of a storage; torch has not written any since 0.4.
        if not isinstance(pid, tuple) or len(pid) != 5 + self.legacy or pid[5:] not in ((), (None,)):
            raise ValueError(f"a storage is given as {pid!r:.80}")
        _, kind, key, _, count = pid[:5]
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"a storage has the key {key!r:.80} and {count!r:.80} elements")
        return self.storages(dtype, key, count)


def read_region(file: FileBytes, start: int, tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
    """A region of a tensor on the meta device whose storage has its first byte at ``start`` of a file."""
    if isinstance(region, Span) and tensor.dim() > 1 and not tensor.is_contiguous():
        row = max(1, tensor[0].numel())
        first, stop = region.start // row, -(-region.stop // row)
        rows = _values(file, start, tensor[first:stop])
        return take(rows, Span(region.start - first * row, region.stop - first * row))
    return _values(file, start, take(tensor, region))


def _values(file: FileBytes, start: int, part: torch.Tensor) -> torch.Tensor:
    values = _strided(file, part, start) if part.numel() else torch.empty(part.shape, dtype=part.dtype, device="cpu")
    values = values.conj() if part.is_conj() else values
    return (values._neg_view() if part.is_neg() else values).resolve_conj().resolve_neg().detach()


def _strided(file: FileBytes, part: torch.Tensor, offset: int) -> torch.Tensor:
    """The values of a tensor with any strides, from a storage whose first byte lies at ``offset``."""
    # A FileBytes reads windows of row-major tensors; a transposed one is such a window with its dimensions in order.
    order = sorted(range(part.dim()), key=lambda dim: (-part.stride()[dim], dim))
    ordered, first = part.permute(order), int(part.storage_offset())
    sizes, strides = tuple(ordered.shape), ordered.stride()
    if all(stride >= inner * size for stride, inner, size in zip(strides, strides[1:], sizes[1:], strict=False)):
        values = file.tensor(part.dtype, offset, Window(first, sizes, strides))
        return values.permute([order.index(dim) for dim in range(part.dim())])
    # Overlapping (an expanded tensor, say): what lies between its first and last element, once.
    extent = Window(0, sizes, strides).extent
    flat = file.tensor(part.dtype, offset, Window(first, (extent,), (1,)))
    return flat.as_strided(part.shape, part.stride())


class _Within:
    """A part of a file; a :class:`~fabric_init.checkpoints.storage.local.FileBytes`."""

    def __init__(self, file: FileBytes, offset: int, length: int) -> None:
        if offset + length > file.size:
            raise ValueError(f"the file has only {file.size:,} bytes")
        self.path, self.size = file.path, length
        self._file, self._offset = file, offset

    def head(self, stop: int) -> bytes:
        return self.part(0, min(stop, self.size))

    def part(self, start: int, stop: int) -> bytes:
        return self._file.part(self._offset + start, self._offset + stop)

    def tensor(self, dtype: torch.dtype, offset: int, window: Window) -> torch.Tensor:
        return self._file.tensor(dtype, self._offset + offset, window)


class Readable(io.RawIOBase):
    """The file as ``zipfile`` wants it, which looks for the directory at the end: that part is fetched once."""

    def __init__(self, file: FileBytes) -> None:
        self._file, self._at = file, 0
        self._tail_start = max(0, file.size - _TAIL_BYTES)
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
        stop = self._file.size if size < 0 else min(self._at + size, self._file.size)
        if self._at >= self._tail_start:
            data = self._tail[self._at - self._tail_start : stop - self._tail_start]
        else:
            data = _part(self._file, self._at, stop)
        self._at += len(data)
        return data


def _part(file: FileBytes, start: int, stop: int) -> bytes:
    stop = min(stop, file.size)
    return file.part(start, stop) if start < stop else b""
