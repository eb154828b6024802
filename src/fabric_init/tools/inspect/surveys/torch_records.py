"""Which bytes of a file of ``torch.save`` are which storage; also where the file is cut short.

A whole zip file has a directory at its end. One that is cut short has none, but each record has a header of its own,
and the first of them is the pickle, which gives the sizes: so it can be walked from the beginning. In the legacy format
storages follow the pickles, in an order that the last of these gives.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from fabric_init.checkpoints.formats.pickles.limits import AllocationUnpickler, ExcessiveAllocationError
from fabric_init.checkpoints.formats.torch_save.legacy import BoundedFile, check_sizes
from fabric_init.checkpoints.formats.torch_save.meta_tensors import load_meta
from fabric_init.checkpoints.formats.torch_save.zip_file import (
    LOCAL_MAGIC,
    bytes_at,
    local_header,
    open_zip,
)
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.tools.inspect.contents import Damage

_CENTRAL, _END = b"PK\1\2", b"PK\5\6"
_END_BYTES = 22
_PICKLE_BYTES = 1 << 28
"""More than any pickle of tensors takes: those of 100,000 take 20 MB."""
_DIRECTORY_BYTES = 1 << 26
_DESCRIPTOR_BYTES = 24
"""Behind a record there may be its checksum and sizes."""
_SMALL = 4096
"""Records of torch besides the pickle and the storages take less, a few dozen bytes each."""


class Records:
    """The storages of one file.

    Attributes:
        starts: key of a storage -> its first byte.
        wrong: key -> what is the matter with it.
        truncated: the file ends too early.
        damage: what is wrong besides.
    """

    def __init__(self, file: FileBytes) -> None:
        self.starts: dict[str, int] = {}
        self.wrong: dict[str, str] = {}
        self.truncated = False
        self.damage: list[Damage] = []
        self._file = file
        self._sizes: dict[str, int] = {}
        self._walk_from: int | None = None

    def place(self, claims: Mapping[str, int]) -> None:
        """Compare with the sizes that the pickle gives; of a file without a directory, find where they lie."""
        if self._walk_from is not None:
            self._walk(self._walk_from, claims)
            return
        for key, nbytes in claims.items():
            if key not in self._sizes:
                self.wrong[key] = f"storage {key} is missing"
            elif self._sizes[key] != nbytes:
                self.wrong[key] = f"storage {key} has {self._sizes[key]:,} bytes, and should have {nbytes:,}"

    def read_directory(self, archive: zipfile.ZipFile, prefix: str) -> None:
        """Return the entries of the directory at the end, with the header of each record."""
        infos = [info for info in archive.infolist() if info.filename.startswith(f"{prefix}data/")]
        for info in infos:
            key = info.filename.removeprefix(f"{prefix}data/")
            header = local_header(self._file, info.header_offset)
            self._sizes[key] = info.file_size
            if header is None or info.compress_type != zipfile.ZIP_STORED:
                self.wrong[key] = f"storage {key} is not where the directory says, at {info.header_offset:,}"
                continue
            self.starts[key] = header.start
            if self.starts[key] + info.file_size > archive.start_dir:
                self.wrong[key] = f"storage {key} reaches into the directory"
        reach = 0
        for key, start in sorted(self.starts.items(), key=lambda item: item[1]):
            if start < reach and self._sizes[key]:
                self.wrong[key] = f"storage {key} overlaps the one before it"
            reach = max(reach, start + self._sizes[key])

    def compare_end(self, comment: int) -> None:
        """Nothing may follow the directory."""
        tail = bytes_at(self._file, max(0, self._file.size - (1 << 16)), 1 << 16)
        at = tail.rfind(_END)
        extra = len(tail) - at - _END_BYTES - comment
        if at >= 0 and extra > 0:
            message = f"{extra:,} bytes after the end of the archive, from {self._file.size - extra:,} on"
            self.damage.append(Damage("trailing bytes", message, self._file.path.name))

    def start_walk(self, at: int) -> None:
        """There is no directory: the records are to be found from byte ``at`` on."""
        self._walk_from = at

    def _walk(self, at: int, claims: Mapping[str, int]) -> None:
        self.truncated = True
        size = self._file.size
        while at < size:
            if bytes_at(self._file, at, len(_CENTRAL)) == _CENTRAL:
                break
            header = local_header(self._file, at)
            if header is None:
                return
            key = header.name.partition("/data/")[2]
            nbytes = claims.get(key)
            if nbytes is not None:
                self.starts[key] = header.start
            following = _next(
                self._file, header.start + (nbytes or 0), _SMALL if nbytes is None else _DESCRIPTOR_BYTES + 4
            )
            if following is None:
                return
            at = following
        self._look_for_end(at)

    def _look_for_end(self, at: int) -> None:
        """All records are there; either the directory is not, or so much follows it that nobody finds it."""
        rest = bytes_at(self._file, at, _DIRECTORY_BYTES)
        end = rest.find(_END)
        if end < 0 or len(rest) < end + _END_BYTES:
            return
        stop = at + end + _END_BYTES + int.from_bytes(rest[end + 20 : end + 22], "little")
        if stop < self._file.size:
            self.truncated = False
            message = f"{self._file.size - stop:,} bytes after the end of the archive, from {stop:,} on"
            self.damage.append(Damage("trailing bytes", message, self._file.path.name))


def zip_records(file: FileBytes) -> tuple[bytes, Records]:
    """Return the pickle of a zip file of ``torch.save``, and what is known of its records.

    Raises any exception when there is no pickle in it.
    """
    records = Records(file)
    try:
        archive = open_zip(file)
    except zipfile.BadZipFile:
        return _first_record(file, records), records
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    (name,) = names
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(file.size, _PICKLE_BYTES):
        raise zipfile.BadZipFile("its pickle is compressed, so torch.save did not write it")
    records.read_directory(archive, name.removesuffix("data.pkl"))
    records.compare_end(len(archive.comment))
    return archive.read(name), records


def _first_record(file: FileBytes, records: Records) -> bytes:
    """Return the pickle without the directory: it comes first, and marks its own end."""
    header = local_header(file, 0)
    if header is None or not header.name.endswith("/data.pkl"):
        raise zipfile.BadZipFile("it has no directory, and does not begin with a pickle")
    start, window = header.start, 1 << 16
    while True:
        data = bytes_at(file, start, window)
        after = data.find(LOCAL_MAGIC)
        if after >= 0 or len(data) < window or window >= _PICKLE_BYTES:
            break
        window *= 2
    records.start_walk(start + after if after >= 0 else file.size)
    return data[:after] if after >= 0 else data


def _next(file: FileBytes, at: int, within: int) -> int | None:
    """Return where the next header begins, behind a record that ends at ``at`` or a little later."""
    if at >= file.size:
        return None
    found = bytes_at(file, at, within)
    places = [place for magic in (LOCAL_MAGIC, _CENTRAL) if (place := found.find(magic)) >= 0]
    return at + min(places) if places else None


def legacy_records(
    file: FileBytes, load: Callable[[BinaryIO], Any], claims: Mapping[str, int], numbers: Mapping[str, int]
) -> tuple[Any, Records]:
    """Return what a legacy file holds, and where its storages are.

    Args:
        file: the file.
        load: loads its content from a pickle, and so fills the other two.
        claims: key of a storage -> its bytes, as the pickle has it.
        numbers: the same in elements, which stand before each storage, too.

    Raises any exception when its pickles cannot be read.
    """
    records = Records(file)
    with BoundedFile(file.path) if isinstance(file.path, Path) else io.BytesIO(file.head(file.size)) as content:
        calls = AllocationUnpickler(content, file.size, "latin1")
        for _ in range(4):  # looked through before anything is made: a damaged pickle may ask for any amount of memory
            calls.look_through()
        content.seek(0)
        for expected in (MAGIC_NUMBER, PROTOCOL_VERSION, None):  # then the system's sizes
            found = load_meta(content, _no_storage)
            if expected is not None and found != expected:
                raise ValueError(f"{expected} should be in its head, and {found!r:.80} is")
        loaded = load(content)
        behind = content.tell()
        try:
            calls.look_through()
            content.seek(behind)
            order = load_meta(content, _no_storage)
            at = content.tell()
        except Exception:  # it ends here; no storage can be there
            order, at = [], file.size
            records.truncated = True
        if at + sum(claims.values()) <= file.size:
            try:
                content.seek(0)
                check_sizes(content, file.size)
            except ExcessiveAllocationError as error:
                records.damage.append(Damage("unreadable", str(error), file.path.name))
    for key in order if isinstance(order, list) else []:
        head = bytes_at(file, at, 8)
        number = int.from_bytes(head, "little")
        if len(head) == 8 and number != numbers.get(key):
            records.wrong[key] = f"storage {key} has {number:,} elements by its own head"
        records.starts[key] = at + 8
        at += 8 + claims.get(key, 0)
    records.truncated |= at > file.size
    if at < file.size:
        message = f"{file.size - at:,} bytes after the last storage, from {at:,} on"
        records.damage.append(Damage("trailing bytes", message, file.path.name))
    return loaded, records


def _no_storage(*_: object) -> Any:
    raise ValueError("a storage where there should be none")
