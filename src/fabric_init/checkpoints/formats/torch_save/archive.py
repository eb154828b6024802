"""Zip files of ``torch.save``, read through any :class:`~fabric_init.checkpoints.storage.local.FileBytes`.

[Note: torch files without torch.load]
``torch.load`` would believe whatever sizes the pickle states, read all that cannot be mapped, and not see that a mapped
file changes; of a part of a file (a chunk of ``torch.distributed.checkpoint``) it would read all. Here only the zip
directory and the pickle are read. The pickle goes through torch's own ``weights_only`` unpickler, with storages on the
meta device in the place of those in the file. So shapes, strides, slices and ties are torch's own; the values of a
tensor, or of a region of it, are then read where the record of its storage lies.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fabric_init._torch_internals import tree_map_only
from fabric_init.checkpoints.formats.pickles.limits import check_calls
from fabric_init.checkpoints.formats.pickles.unsafe_globals import unsafe_globals
from fabric_init.checkpoints.formats.torch_save.corruption import corruption_of
from fabric_init.checkpoints.formats.torch_save.meta_tensors import (
    MetaStorages,
    load_meta,
    places_of_region,
    read_region,
)
from fabric_init.checkpoints.formats.torch_save.zip_file import TAIL_BYTES, FilePart, local_header, open_zip
from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.errors import CheckpointFormatError

_CHUNK_TAIL_BYTES = 1 << 12
"""The directory of an archive with one tensor takes about 600 bytes."""
_CHUNK_PICKLE_BYTES = 1 << 16
"""The pickle of one tensor takes about 200 bytes; a damaged archive may claim any size."""

_HEADER_BYTES = 256
"""The local header of a record, and what aligns its data to 64 bytes, take no more."""

StandIns = Sequence[tuple[type, str]]
"""Harmless classes of ours for classes that a pickle may name, each with the full name in the file."""

_allowed_list = threading.Lock()


class TorchArchive:
    """One zip file of ``torch.save``: opened for its directory and pickle, then :meth:`load`, then :meth:`read`.

    The first two raise ``zipfile.BadZipFile``, ``pickle.UnpicklingError`` or any other exception for what is no such
    file, and reading an error that names the file.
    """

    def __init__(self, file: FileBytes, *, tail_bytes: int = TAIL_BYTES, pickle_bytes: int | None = None) -> None:
        self.file = file
        zip_file = open_zip(file, tail_bytes=tail_bytes)
        self._records = {record.filename: record for record in zip_file.infolist()}
        names = [name for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise zipfile.BadZipFile("it has no single data.pkl, so torch.save did not write it")
        self._prefix = names[0].removesuffix("data.pkl")
        if self._prefix + "byteorder" in self._records and self._small_record("byteorder") != sys.byteorder.encode():
            raise ValueError("it was saved on a machine of the other byte order")
        self._storages = MetaStorages()
        self._starts: dict[str, int] = {}
        self.pickle = self._small_record("data.pkl", pickle_bytes)

    def load(self, stand_ins: StandIns = ()) -> Any:
        """Return what was given to ``torch.save``, its tensors on the meta device."""
        check_calls(self.pickle, self.file.size)
        with _allowing(stand_ins):
            content = load_meta(io.BytesIO(self.pickle), self._storages.storage)
        self._check_records()
        return content

    def load_tensor(self) -> torch.Tensor:
        """Return the only thing that was given to ``torch.save``, a tensor, on the meta device.

        Raises:
            ValueError: it is something else.
        """
        tensor, self._storages = _tensor_of(self.pickle)
        self._check_records()
        if not self.reaches(tensor):
            raise ValueError("it is larger than its storage")
        return tensor

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the values of a tensor are in this file."""
        return self._storages.holds(tensor)

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's last element lies inside its storage."""
        return self._storages.reaches(tensor)

    def read(self, tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
        """Return a region of one of the tensors that :meth:`load` returned, or of a view of it."""
        with corruption_of(self.file.path):
            return read_region(self.file, self.start(tensor), tensor, region)

    def places(self, tensor: torch.Tensor, region: Region | None) -> Iterator[Place]:
        """Yield where :meth:`read` reads, as far as the directory tells."""
        if tensor.numel():
            key = self._storages.key(tensor)
            header, known = self._record(f"data/{key}").header_offset, self._starts.get(key)
            yield self.file.place(header, min(header + _HEADER_BYTES, self.file.size))
            for file, start, stop in places_of_region(self.file, known or header, tensor, region):
                end = min(stop + (0 if known else _HEADER_BYTES), self.file.size)
                yield Place(file, start, end)

    def with_values(self, content: Any) -> Any:
        """Return a part of what :meth:`load` returned, with its tensors read."""

        def value(tensor: torch.Tensor) -> torch.Tensor:
            if not self.holds(tensor):
                return tensor
            if not self.reaches(tensor):
                raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is larger than its storage")
            return self.read(tensor, None)

        with corruption_of(self.file.path):
            return _mapped(value, content, {})

    def start(self, tensor: torch.Tensor) -> int:
        """Return the first byte of the tensor's storage; 0 for a tensor without elements."""
        if not tensor.numel():
            return 0
        key = self._storages.key(tensor)
        if key not in self._starts:
            self._starts[key] = self._data_of(self._record(f"data/{key}"))
        return self._starts[key]

    def _check_records(self) -> None:
        for key, nbytes in self._storages.sizes.items():
            record = self._record(f"data/{key}")
            # torch never compresses; a record that lies about its size would return bytes of its neighbor
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != nbytes:
                raise zipfile.BadZipFile(f"the record of storage {key} has not the size that the pickle states")

    def _record(self, name: str) -> zipfile.ZipInfo:
        if self._prefix + name not in self._records:
            raise zipfile.BadZipFile(f"it has no record {name}")
        return self._records[self._prefix + name]

    def _small_record(self, name: str, most: int | None = None) -> bytes:
        record = self._record(name)
        if record.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"its archive is compressed, so torch.save did not write it ({name})")
        if record.file_size > (self.file.size if most is None else most):
            raise zipfile.BadZipFile(f"{name} is stated to have {record.file_size:,} bytes")
        start = self._data_of(record)
        data = self.file.part(start, start + record.file_size)
        if zlib.crc32(data) != record.CRC:
            raise zipfile.BadZipFile(f"the checksum (CRC-32) of {name} is wrong")
        return data

    def _data_of(self, record: zipfile.ZipInfo) -> int:
        """Return the first byte of a record's data."""
        header = local_header(self.file, record.header_offset)
        if header is None:
            raise zipfile.BadZipFile(f"there is no header of the record {record.filename} where it should be")
        if header.start + record.file_size > self.file.size:
            raise zipfile.BadZipFile(f"the record {record.filename} sticks out of the file")
        return header.start


class TorchArchives:
    """Several archives that together hold the tensors of a checkpoint."""

    def __init__(self, archives: Sequence[TorchArchive]) -> None:
        self._archives = archives

    def home(self, tensor: torch.Tensor) -> TorchArchive:
        """Return the archive with the values of a tensor."""
        return next(archive for archive in self._archives if archive.holds(tensor))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether one of the archives has the values of a tensor."""
        return any(archive.holds(tensor) for archive in self._archives)

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's last element lies inside its storage."""
        return self.home(tensor).reaches(tensor)

    def read(self, tensor: torch.Tensor, region: Region | None = None) -> torch.Tensor:
        """Return a region of a tensor."""
        return self.home(tensor).read(tensor, region)

    def places(self, tensor: torch.Tensor, region: Region | None = None) -> Iterator[Place]:
        """Yield where :meth:`read` reads."""
        return self.home(tensor).places(tensor, region)

    def with_values(self, content: Any) -> Any:
        """Return a part of what was loaded, with its tensors read."""
        for archive in self._archives:
            content = archive.with_values(content)
        return content


class SavedTensor(NamedTuple):
    """A tensor in an open file."""

    file: FileBytes
    start: int
    """The first byte of its storage."""
    tensor: torch.Tensor
    """On the meta device."""

    def read(self, region: Region | None) -> torch.Tensor:
        """Return a region, mapped where the file is mapped and its bytes are aligned."""
        return read_region(self.file, self.start, self.tensor, region)


def find_saved_tensor(
    file: FileBytes, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> SavedTensor:
    """Return the one tensor that was saved to bytes ``offset`` to ``offset + length`` of ``file``.

    Raises:
        CheckpointFormatError: there is something else, or a tensor of another dtype or shape.
    """
    try:
        part = FilePart(file, offset, length)
        archive = TorchArchive(part, tail_bytes=_CHUNK_TAIL_BYTES, pickle_bytes=_CHUNK_PICKLE_BYTES)
        try:
            tensor = archive.load_tensor()
        except pickle.UnpicklingError as error:
            if blocked := unsafe_globals(archive.pickle):
                raise ValueError(f"it names {blocked[0]}, which could run code") from error
            raise
        if tensor.dtype is not dtype:
            raise ValueError(f"it is a tensor of {tensor.dtype}, not {dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"it is a tensor of shape {tuple(tensor.shape)}, not {shape}")
        return SavedTensor(part, archive.start(tensor), tensor)
    except CheckpointFormatError:
        raise
    except Exception as error:  # a damaged archive or pickle raises errors of many types
        reason = str(error) or type(error).__name__
        raise CheckpointFormatError(
            f"{file.path} does not hold what torch.save wrote at bytes {offset:,} to {offset + length:,}: {reason}. "
            f"If a copy was cut short, make it again."
        ) from error


def _mapped(value: Callable[[torch.Tensor], torch.Tensor], content: Any, done: dict[int, Any]) -> Any:
    """Return ``content`` with ``value`` of each tensor in its dicts, lists and tuples; what is shared stays shared.

    A pickle of a few hundred bytes can share so that a walk without ``done`` would have no end.
    """
    if id(content) in done:
        return done[id(content)]
    kind = type(content)
    if isinstance(content, torch.Tensor):
        made: Any = value(content)
    elif kind is list:
        made = [_mapped(value, item, done) for item in content]
    elif kind is tuple:
        made = tuple(_mapped(value, item, done) for item in content)
    elif kind in (dict, OrderedDict):
        made = kind((key, _mapped(value, item, done)) for key, item in content.items())
    else:
        made = tree_map_only(torch.Tensor, value, content)
    done[id(content)] = made
    return made


# Chunks of one shape have one pickle, and a checkpoint has thousands of chunks: most of the time goes into the
# unpickler. What is returned is never written to.
@lru_cache(maxsize=256)
def _tensor_of(data: bytes) -> tuple[torch.Tensor, MetaStorages]:
    check_calls(data, len(data))
    storages = MetaStorages()
    tensor = load_meta(io.BytesIO(data), storages.storage)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not storages.holds(tensor):
        raise ValueError(f"it holds no plain tensor but {tensor!r:.80}")
    return tensor.detach(), storages


def load_within(file: FileBytes, offset: int, length: int) -> Any:
    """Return what ``torch.save`` was given, which has put it into these bytes of a file. Raise as the archive does."""
    archive = TorchArchive(FilePart(file, offset, length))
    return archive.with_values(archive.load())


@contextmanager
def _allowing(stand_ins: StandIns) -> Iterator[None]:
    if not stand_ins:
        yield
        return
    # torch keeps one list for the process: without the lock the thread that is done first would end it for the others.
    with _allowed_list, torch.serialization.safe_globals(list(stand_ins)):
        yield
