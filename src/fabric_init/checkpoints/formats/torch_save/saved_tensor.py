"""One tensor that ``torch.save`` wrote into a part of a file: where its elements lie, and regions of it.

``torch.load`` maps whole files only; from a part of one it would read all of the tensor. So the zip archive and its
small pickle are looked at here, see https://docs.pytorch.org/docs/stable/notes/serialization.html, and the elements are
left in the file.
"""

from __future__ import annotations

import io
import math
import sys
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from fabric_init.checkpoints.formats.pickles.restricted import Record, load_inert
from fabric_init.checkpoints.region import Box, Region, Span, Window, window
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.errors import CheckpointFormatError

# All that belongs to one tensor, but for its elements, takes about 1,500 bytes; a damaged archive may ask for more.
_READ_AT_ONCE = 1 << 20
_LOCAL_HEADER = 30
"""Bytes of a zip entry's own header; its name and an extra field follow, whose lengths are its last four bytes."""

_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_UNTYPED = "torch.storage.UntypedStorage"
STORAGES = {
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_NAMES = frozenset({*_REBUILD, *STORAGES, _UNTYPED, "collections.OrderedDict"})


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A dense tensor in an open file."""

    file: FileBytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Its first byte."""
    order: tuple[int, ...]
    """Its dimensions as they are laid out in the file, the slowest first."""
    conjugated: bool
    negated: bool

    @property
    def row_major(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def read(self, region: Region) -> torch.Tensor:
        """The region, mapped where the file is and where its bytes are aligned; a span only if ``row_major``."""
        if isinstance(region, Span):
            assert self.row_major
            part = self._elements(window(self.shape, region))
        else:
            laid_out = [self.shape[dim] for dim in self.order]
            box = Box(tuple(region.offsets[d] for d in self.order), tuple(region.sizes[d] for d in self.order))
            part = self._elements(window(tuple(laid_out), box))
            part = part.permute([self.order.index(dim) for dim in range(len(self.order))])
        part = torch.conj_physical(part) if self.conjugated else part
        return (torch.neg(part) if self.negated else part).detach()

    def _elements(self, place: Window) -> torch.Tensor:
        return self.file.tensor(self.dtype, self.start, place)


def find_saved_tensor(
    file: FileBytes, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> SavedTensor:
    """The tensor that was saved to bytes ``offset`` to ``offset + length`` of ``file``; it should be as given.

    Raises :class:`~fabric_init.errors.CheckpointFormatError` when something else lies there.
    """
    try:
        return _find(file, offset, length, dtype, shape)
    except CheckpointFormatError:
        raise
    except Exception as error:  # zipfile raises errors of many types for what is no archive, or a damaged one
        reason = str(error) or type(error).__name__
        raise CheckpointFormatError(
            f"{file.path} does not hold what torch.save wrote at bytes {offset:,} to {offset + length:,}: {reason}. "
            f"If a copy was cut short, make it again."
        ) from error


def _find(file: FileBytes, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> SavedTensor:
    part = _Part(file, offset, length)
    with zipfile.ZipFile(part) as archive:
        entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
        for entry in entries.values():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its archive is compressed")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
            raise ValueError("it was written on a machine of the other byte order")
        found = load_inert(archive.read(entries["data.pkl"]), _NAMES)
    storage, first, sizes, strides, bits = _arguments(found, dtype)
    if sizes != shape:
        raise ValueError(f"it is a tensor of shape {sizes}, not {shape}")
    order = _dense_order(sizes, strides)
    record = entries[f"data/{storage}"]
    if first < 0 or (first + math.prod(sizes)) * dtype.itemsize > record.file_size:
        raise ValueError(f"its {math.prod(sizes)} elements do not fit in the {record.file_size} bytes of its storage")
    header = part.at(record.header_offset, _LOCAL_HEADER)
    skipped = _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = record.header_offset + skipped
    if not header.startswith(b"PK\x03\x04") or start + record.file_size > length:
        raise ValueError("its storage is not where the archive says")
    return SavedTensor(
        file,
        dtype,
        sizes,
        offset + start + first * dtype.itemsize,
        order,
        bool(bits.get("conj")),
        bool(bits.get("neg")),
    )


def _arguments(found: object, dtype: torch.dtype) -> tuple[str, int, tuple[int, ...], tuple[int, ...], dict[str, bool]]:
    """Name of the storage, offset, sizes, strides and math bits, out of the call that makes the tensor."""
    if not isinstance(found, Record) or found.name not in _REBUILD or len(found.arguments) < 6:
        raise ValueError(f"it holds no plain tensor but {found!r:.80}")
    persistent, first, sizes, strides = found.arguments[:4]
    untyped = found.name == _REBUILD[1]  # storage, offset, sizes, strides, requires_grad, hooks, dtype, bits
    rest = found.arguments[6:]
    bits: Any = rest[untyped] if len(rest) > untyped else {}
    kind, storage_class, storage, _, _ = persistent.arguments[0]
    saved = rest[0] if untyped else STORAGES.get(storage_class.full)
    if saved is not dtype:
        raise ValueError(f"it is a tensor of {saved}, not {dtype}")
    numbers = (first, *sizes, *strides)
    if kind != "storage" or not all(type(n) is int and n >= 0 for n in numbers) or len(sizes) != len(strides):
        raise ValueError(f"its tensor has sizes and strides {sizes!r:.80}, {strides!r:.80}")
    return storage, first, sizes, strides, bits or {}


def _dense_order(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions, largest stride first. Raises ``ValueError`` if elements overlap or leave gaps."""
    plain = tuple(range(len(sizes)))
    expected = window(sizes, None).strides
    if not math.prod(sizes) or all(s == 1 or a == b for s, a, b in zip(sizes, strides, expected, strict=True)):
        return plain
    order = tuple(sorted(plain, key=lambda dim: (sizes[dim] > 1, -strides[dim])))
    expected = window(tuple(sizes[dim] for dim in order), None).strides
    if any(sizes[dim] > 1 and strides[dim] != stride for dim, stride in zip(order, expected, strict=True)):
        raise ValueError(f"its tensor of sizes {sizes} and strides {strides} has gaps or overlaps itself")
    return order


class _Part(io.RawIOBase):
    """A part of a file as a file, for small reads."""

    def __init__(self, file: FileBytes, offset: int, length: int) -> None:
        if offset + length > file.size:
            raise ValueError(f"the file has only {file.size:,} bytes")
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def at(self, start: int, count: int) -> bytes:
        start, stop = min(start, self._length), min(start + count, self._length)
        return self._file.part(self._offset + start, self._offset + stop)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if self._position < 0:
            raise OSError("a seek to before the beginning")
        return self._position

    def read(self, count: int = -1) -> bytes:
        count = max(0, self._length - self._position) if count is None or count < 0 else count
        if count > _READ_AT_ONCE:
            raise ValueError(f"its archive asks for {count:,} bytes besides the elements")
        data = self.at(self._position, count)
        self._position += len(data)
        return data
