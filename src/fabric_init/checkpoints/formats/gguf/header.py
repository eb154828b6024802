"""The header of one GGUF file: what it states of the model, and where each tensor lies.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As in llama.cpp, tensors follow one another in
the order of the header, each padded to the alignment; a header that says otherwise is damaged.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from fabric_init.checkpoints.formats.gguf.blocks import GgmlType, ggml_type
from fabric_init.checkpoints.region import is_below
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.errors import CheckpointFormatError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MOST_DIMENSIONS = 4
_MOST_BYTES = 65536  # of a name: llama.cpp's limit for keys; it has 64 for tensors
_KEPT = 1024  # elements; a longer array is the tokenizer's
_CHUNK = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class StoredTensor(NamedTuple):
    """A tensor in a file, its shape in torch's order."""

    key: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    """Of its first byte in the file."""


class Header(NamedTuple):
    """What a GGUF file says before its data."""

    fields: dict[str, Any]
    """Its key-value pairs, without the long arrays of a tokenizer."""
    tensors: list[StoredTensor]


def read_header(file: FileBytes) -> Header:
    """Return the header of ``file``.

    Raises:
        CheckpointFormatError: it is damaged, or has a type that is unknown.
    """
    cursor = _Cursor(file)
    try:
        return _parse(cursor)
    except (_DamageError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointFormatError(
            f"{file.path} is not a complete GGUF file of {file.size:,} bytes: {error}, near byte {cursor.at:,}. If a "
            "download or copy was cut short, fetch it again."
        ) from None


class _DamageError(Exception):
    """The bytes are not those of a header."""


def _parse(cursor: _Cursor) -> Header:
    if cursor.take(4) != MAGIC:
        raise _DamageError("it does not begin with GGUF")
    version = cursor.number("I")
    if not version & 0xFFFF:
        raise _DamageError("it is written for big-endian machines, which is not read: convert the model again")
    if version not in _VERSIONS:
        raise _DamageError(f"version {version} is none of {_VERSIONS}")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Any] = {}
    for _ in range(pairs):
        name = cursor.text()
        if name in fields:
            raise _DamageError(f"the field {name!r} is there twice")
        fields[name] = _value(cursor, cursor.number("I"))
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamageError(f"general.alignment is {alignment!r}, not a power of two")
    return Header(fields, _placed(cursor, entries, alignment))


def _value(cursor: _Cursor, kind: int) -> Any:
    """Return a value; of an array that is long, or of text, only its length."""
    if kind == _STRING:
        return cursor.text(of_any_length=True)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise _DamageError(f"there is no value of type {kind}")
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == _STRING:
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
        return count
    if kind not in _SCALARS:
        raise _DamageError(f"there is no array of type {kind}")
    code = _SCALARS[kind]
    if count > _KEPT:
        cursor.skip(count * struct.calcsize(code))
        return count
    return list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize(code))))


class _Entry(NamedTuple):
    key: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    """In the data section."""


def _entry(cursor: _Cursor) -> _Entry:
    key = cursor.text()
    dimensions = cursor.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise _DamageError(f"tensor {key!r} has {dimensions} dimensions, of at most {_MOST_DIMENSIONS}")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    if not is_below(2**63, shape):
        raise _DamageError(f"tensor {key!r} has shape {shape}, beyond what torch can hold")
    code, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = ggml_type(code)
    except (ValueError, ModuleNotFoundError) as error:
        raise CheckpointFormatError(f"{cursor.path}: tensor {key!r} {error}") from None
    if shape and shape[-1] % kind.block:
        raise _DamageError(
            f"tensor {key!r} has rows of {shape[-1]} elements, and {kind.name} has blocks of {kind.block}"
        )
    if not shape and kind.block != 1:
        raise _DamageError(f"tensor {key!r} is a scalar, and {kind.name} has blocks of {kind.block}")
    return _Entry(key, shape, kind, offset)


def _placed(cursor: _Cursor, entries: list[_Entry], alignment: int) -> list[StoredTensor]:
    start = _padded(cursor.at, alignment)
    found: dict[str, StoredTensor] = {}
    offset = stop = 0
    for key, shape, kind, claimed in entries:
        if key in found:
            raise _DamageError(f"the tensor {key!r} is there twice")
        if claimed != offset:
            raise _DamageError(f"tensor {key!r} is said to lie at {claimed:,} of the data, and should at {offset:,}")
        found[key] = StoredTensor(key, shape, kind, start + offset)
        stop = offset + math.prod(shape) // kind.block * kind.bytes
        offset = _padded(stop, alignment)
    if stop and start + stop > cursor.size:
        raise _DamageError(f"its tensors take {start + stop:,} bytes")
    return list(found.values())


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Cursor:
    """Reads a header from its beginning on, some of it at a time: nobody knows before how long it is."""

    def __init__(self, file: FileBytes) -> None:
        self._file = file
        self._chunk, self._start = b"", 0
        self.path, self.size = file.path, file.size
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        begin = self.at
        self.skip(count)
        if begin < self._start or self.at > self._start + len(self._chunk):
            self._start = begin
            self._chunk = self._file.part(begin, min(self.size, max(self.at, begin + _CHUNK)))
        return self._chunk[begin - self._start : self.at - self._start]

    def skip(self, count: int) -> None:
        """Pass over ``count`` bytes."""
        if self.at + count > self.size:
            raise _DamageError(f"it ends before {count:,} bytes that it announces")
        self.at += count

    def number(self, code: str) -> Any:
        """Return a number, whose type is given by its code for :mod:`struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, *, of_any_length: bool = False) -> str:
        """Return text; a name, if it is not of any length."""
        length = self.number("Q")
        if length > _MOST_BYTES and not of_any_length:
            raise _DamageError(f"a name of {length:,} bytes")
        return self.take(length).decode()
