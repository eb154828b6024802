"""How much memory a legacy file of ``torch.save`` asks for, found out before ``torch.load`` allocates it.

In that format storages lie behind the pickle that gives their sizes, and ``torch.load`` believes the pickle. One wrong
byte would make it ask for any amount.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from fabric_init.checkpoints.inert_pickle import InertReader, Name
from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.saved_tensor import STORAGES

_HEADERS = 3
"""Pickles before that of the content: a magic number, the version, the system's sizes."""


class BoundedFile(io.BufferedReader):
    """A file that never makes room for more than it holds: a damaged pickle may ask for any length."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = max(0, min(size, self._size - self.tell()))
        return super().read(size)


class TooLargeError(ValueError):
    """More memory than the file can be meant to take."""


def check_sizes(file: BinaryIO, size: int) -> None:
    """Look through the pickles of ``file``, which has ``size`` bytes. The file is left where it was.

    Raises :class:`TooLargeError` when its storages take more than that, or a tensor does not fit in its storage, which
    ``torch.load`` would then let grow.
    """
    start = file.tell()
    claims = _Claims(file, size)
    try:
        for _ in range(_HEADERS + 1):
            claims.load()
    except TooLargeError:
        raise
    except Exception:  # torch.load fails at the same place, and says better what is wrong
        return
    finally:
        file.seek(start)


class _Made(dict[Any, Any]):
    """Stands for whatever object was made: it takes what is put into it, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


class _Storage(NamedTuple):
    item_bytes: int
    size_bytes: int


class _Claims(InertReader):
    """Adds up the sizes of storages and compares those of tensors. All else in the pickle is passed over."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(InertReader.dispatch)
    for _name in ("EMPTY_SET", "ADDITEMS", "SHORT_BINSTRING"):
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        pickle._Unpickler.__init__(self, file, encoding="latin1")
        self._known: set[object] = set()
        self._left = self._all = size

    def find_class(self, module: str, name: str) -> Name:
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, _ = pid
        dtype = STORAGES.get(kind.full)
        storage = _Storage(dtype.itemsize if dtype else 1, count * (dtype.itemsize if dtype else 1))
        self._left -= 0 if key in self._known else storage.size_bytes
        self._known.add(key)
        if self._left < 0:
            raise TooLargeError(f"its storages should take more than the {self._all:,} bytes of all of the file")
        return storage

    def _make(self) -> None:
        arguments = self.stack.pop()
        if arguments and isinstance(arguments[0], _Storage):
            storage, first, sizes, strides = arguments[:4]
            if min(strides, default=0) < 0:
                raise TooLargeError(f"a tensor has the strides {strides!r:.80}")
            end = (first + Window(0, sizes, strides).extent) * storage.item_bytes
            if end > storage.size_bytes:
                raise TooLargeError(f"a tensor ends at byte {end:,} of a storage of {storage.size_bytes:,}")
        self.stack[-1] = _Made()

    def _pass(self) -> None:
        self.stack.pop()

    dispatch[pickle.REDUCE[0]] = _make
    dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.BUILD[0]] = _pass
