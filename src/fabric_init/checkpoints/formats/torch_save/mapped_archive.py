"""A zip file of ``torch.save``, mapped by ``torch.load``: for tensors that are put together out of several files."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fabric_init.checkpoints.formats.pickles.limits import check_calls
from fabric_init.checkpoints.formats.torch_save.archive import TorchArchive, unsafe_globals
from fabric_init.checkpoints.formats.torch_save.reader import corruption_of, refuse_code
from fabric_init.checkpoints.storage.local import changed, identity, open_bytes
from fabric_init.errors import CheckpointFormatError

_MAP_PRIVATE = 2  # mmap.MAP_PRIVATE on every POSIX system; the name is missing on Windows
_allowed_list = threading.Lock()


def maps_privately() -> bool:
    """Whether writes to what :class:`MappedArchive` holds stay in this process."""
    # torch.serialization.set_default_mmap_options may have asked for shared maps; writes would reach the file.
    return torch.serialization.get_default_mmap_options() in (None, _MAP_PRIVATE)


class MappedArchive:
    """One such file: what was saved is under :attr:`content`, its tensors still in the file.

    Args:
        path: of the file.
        stand_ins: what to use for classes that the pickle may name: (harmless class of ours, full name in the file).

    Raises :class:`~fabric_init.errors.CheckpointNotFoundError` when it is missing and
    :class:`~fabric_init.errors.CheckpointFormatError` when it is no such file or carries code.
    """

    def __init__(self, path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> None:
        self.path = path
        file = open_bytes(path, mmap=False)
        self._size = file.size
        with corruption_of(path), _allowing(stand_ins):
            self._identity = identity(os.stat(path))
            archive = TorchArchive(file)
            try:
                check_calls(archive.pickle, file.size)
                self.content: Any = torch.load(os.fspath(path), mmap=True, weights_only=True, map_location="cpu")
            except pickle.UnpicklingError:
                refuse_code(path, unsafe_globals(archive.pickle))
                raise

    def check_unchanged(self) -> None:
        """Raise :class:`~fabric_init.errors.CheckpointFormatError` if the file is not what it was when it was opened.

        Touching a page of the map past the end of the file would kill the process.
        """
        try:
            now = identity(os.stat(self.path))
        except OSError:
            return  # removed: the map keeps what was there
        if now[:2] == self._identity[:2] and now != self._identity:
            raise CheckpointFormatError(changed(self.path, self._size))


@contextmanager
def _allowing(stand_ins: Sequence[tuple[type, str]]) -> Iterator[None]:
    # torch keeps one list for the process: without the lock the thread that is done first would end it for the others.
    with _allowed_list, torch.serialization.safe_globals(list(stand_ins)):
        yield
