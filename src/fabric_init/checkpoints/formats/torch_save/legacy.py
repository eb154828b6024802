"""Limit the memory that a legacy file of ``torch.save`` asks for, before ``torch.load`` allocates it.

In that format storages follow the pickle that states their sizes, and ``torch.load`` believes the pickle. One wrong
byte would make it ask for any amount.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from fabric_init.checkpoints.formats.pickles.limits import AllocationUnpickler, ExcessiveAllocationError
from fabric_init.checkpoints.region import Window

_HEADERS = 3
"""Pickles before that of the content: a magic number, the version, the system's sizes."""


_STORAGE_DTYPES = {
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


class BoundedFile(io.BufferedReader):
    """A file that never allocates more than its size for a read: a damaged pickle may ask for any length."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = max(0, min(size, self._size - self.tell()))
        return super().read(size)


def check_sizes(file: BinaryIO, size: int) -> None:
    """Check the sizes in the pickles of ``file``, which has ``size`` bytes. The file's position does not change.

    Raises:
        ExcessiveAllocationError: its storages take more than that, or a tensor does not fit in its storage, which
            ``torch.load`` would let grow.
        pickle.UnpicklingError: it is not a legacy file of ``torch.save``.
    """
    start = file.tell()
    claims = _Claims(file, size, "latin1")
    try:
        for _ in range(_HEADERS + 1):
            claims.look_through()
    finally:
        file.seek(start)


class _Storage(NamedTuple):
    item_bytes: int
    size_bytes: int


class _Claims(AllocationUnpickler):
    """Unpickler that adds up the sizes of storages, too, and compares tensors with them."""

    def __init__(self, file: BinaryIO, size: int, encoding: str) -> None:
        super().__init__(file, size, encoding)
        self._known: set[object] = set()
        self._for_storages = size

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, _ = pid
        dtype = _STORAGE_DTYPES.get(kind.full)
        storage = _Storage(dtype.itemsize if dtype else 1, count * (dtype.itemsize if dtype else 1))
        self._for_storages -= 0 if key in self._known else storage.size_bytes
        self._known.add(key)
        if self._for_storages < 0:
            raise ExcessiveAllocationError(
                f"its storages should take more than the {self._size:,} bytes of all of the file"
            )
        return storage

    def called(self, function: object, arguments: Any) -> None:
        super().called(function, arguments)
        for made in (arguments, arguments[0] if arguments else ()):  # of a call; set as the state of a tensor
            if isinstance(made, tuple) and made and isinstance(made[0], _Storage):
                storage, first, sizes, strides = made[:4]
                if min(strides, default=0) < 0:
                    raise ExcessiveAllocationError(f"a tensor has the strides {strides!r:.80}")
                end = (first + Window(0, sizes, strides).extent) * storage.item_bytes
                if end > storage.size_bytes:
                    raise ExcessiveAllocationError(
                        f"a tensor ends at byte {end:,} of a storage of {storage.size_bytes:,}"
                    )
