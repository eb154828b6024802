"""Reader for one ``.safetensors`` file.

The format: https://github.com/huggingface/safetensors#format. Eight bytes of header length, a JSON header, the data.

The safetensors library parses and checks the header (in Rust: length limit, offsets in range, no holes, no overlap). It
has no way to hand out a region of a tensor without a copy, or a span, so the bytes come from
:mod:`~fabric_init.checkpoints.storage.local`. A read takes 2-3 microseconds, the library's ``get_tensor`` 12.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Region, is_below, window
from fabric_init.checkpoints.storage.local import FileBytes, Opener, open_bytes, places_of_window
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath, as_path
from fabric_init.errors import CheckpointError, CheckpointFormatError, FabricInitError

HEADER_BYTES = 100_000_000
"""The maximum size of a header; the library's own limit."""

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
DTYPES = {code: getattr(torch, name) for code, name in _DTYPE_NAMES.items() if hasattr(torch, name)}
"""Name of a dtype in the format -> the dtype; an older torch lacks the newest of them."""


class SafetensorsReader(BaseReader):
    """One open ``.safetensors`` file; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    With ``mmap=True`` (the default) ``read`` returns a view of a private copy-on-write map, without a copy: the tensor
    can become the parameter. Writing to it never reaches the file, but two reads of one key share memory. With
    ``mmap=False`` each read copies just the bytes of its region; take that when the file may be overwritten in place.

    Raises:
        CheckpointNotFoundError: the file is missing.
        CheckpointFormatError: it is truncated, corrupt or holds a dtype that torch lacks (F4, F6).
    """

    format = "safetensors"

    def __init__(
        self, path: str | os.PathLike[str] | AnyPath, *, mmap: bool = True, opener: Opener | None = None
    ) -> None:
        self.path = as_path(path)
        self._bytes = open_bytes(self.path, mmap=mmap) if opener is None else opener(self.path)
        direct = opener is None and isinstance(self.path, Path)
        self._offsets, self.specs, self.fields = _parse_header(self._bytes, direct=direct)

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, on the CPU; touches no byte outside the region (mapped: no page).

        Raises:
            KeyError: there is no such tensor.
            CheckpointFormatError: the file changed after it was opened.
        """
        spec = self.spec(key)
        return self._bytes.tensor(spec.dtype, self._offsets[key], window(spec.shape, region))

    def places(self, key: str, region: Region | None = None) -> Iterable[Place]:
        spec, start = self.spec(key), self._offsets[key]
        if region is None:
            return (self._bytes.place(start, start + spec.shape.numel() * spec.dtype.itemsize),)
        return places_of_window(self._bytes, spec.dtype, start, window(spec.shape, region))


def _parse_header(file: FileBytes, *, direct: bool) -> tuple[dict[str, int], dict[str, TensorSpec], Mapping[str, str]]:
    """Return the byte offset in the file and the spec of each key, in the order of the data; and the metadata."""
    try:
        entries, metadata = _entries(file.path) if direct else _entries_of_copy(file)
    except (SafetensorError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        _refuse_unknown_dtype(file, error)
        raise CheckpointFormatError(
            f"{file.path} is not a complete safetensors file of {file.size:,} bytes: {error}. "
            f"If a download or copy was cut short, fetch it again."
        ) from error

    start = 8 + int.from_bytes(file.head(8), "little")
    _refuse_duplicates(file, start, len(entries))
    offsets, specs = dict[str, int](), dict[str, TensorSpec]()
    # The library has checked that tensors follow one another without a hole, so sizes give the offsets.
    offset = start
    for key, code, shape in entries:
        dtype = DTYPES.get(code)
        if dtype is None:
            raise CheckpointFormatError(
                f"{file.path}: tensor {key!r} has dtype {code}, which torch {torch.__version__} cannot hold as a plain "
                f"tensor. Convert it to a dtype of {', '.join(DTYPES)}."
            )
        # Only an empty tensor can lie about its other dimensions: the bytes of any other were counted.
        if not is_below(2**63, shape):
            raise CheckpointFormatError(
                f"{file.path}: tensor {key!r} has shape {str(shape[:20])[:200]}, beyond what torch can hold."
            )
        count = math.prod(shape)
        offsets[key], specs[key] = offset, TensorSpec(torch.Size(shape), dtype)
        offset += count * dtype.itemsize
    if offset != file.size:
        # The library opened the path by itself; between the two the file was replaced.
        raise CheckpointFormatError(f"{file.path} changed while it was opened; open it again.")
    return offsets, specs, metadata


_Entries = list[tuple[str, str, list[int]]]


def _entries(path: AnyPath | str) -> tuple[_Entries, Mapping[str, str]]:
    """Return key, dtype and shape of each tensor, as the library reads and checks them; and the metadata."""
    # "numpy" only chooses what get_tensor would return; "pt" would map the file a second time.
    header: Any = safe_open(path, "numpy")
    parts = [(key, header.get_slice(key)) for key in header.offset_keys()]
    return [(key, part.get_dtype(), part.get_shape()) for key, part in parts], header.metadata() or {}


def _entries_of_copy(file: FileBytes) -> tuple[_Entries, Mapping[str, str]]:
    # The library takes a path only. It gets a file of the same size with the same header and a hole for the data: so it
    # checks the header that was read, wherever that came from.
    length = int.from_bytes(file.head(8), "little")
    header = file.head(8 + min(length, HEADER_BYTES))
    with ExitStack() as stack:
        try:
            copy = os.path.join(stack.enter_context(TemporaryDirectory()), "header.safetensors")
            with open(copy, "wb") as target:
                target.write(header)
                target.truncate(file.size)
        except OSError as error:  # not the checkpoint's fault
            raise FabricInitError(
                f"{file.path}: a copy of its header cannot be written into the folder for temporary files: {error}. "
                "Make space there, or set the environment variable TMPDIR to another folder."
            ) from error
        return _entries(copy)


def _refuse_unknown_dtype(file: FileBytes, error: Exception) -> None:
    """Name the tensor if it is for its dtype that the library has refused the header."""
    unknown = re.search(r"unknown variant `([^`]*)`", str(error))
    if unknown is None:
        return
    try:
        length = int.from_bytes(file.head(8), "little")
        header = json.loads(file.head(8 + min(length, HEADER_BYTES))[8:])
        keys = [key for key, entry in header.items() if isinstance(entry, dict) and entry.get("dtype") == unknown[1]]
    except (ValueError, RecursionError, AttributeError):
        return
    if keys:
        more = f" (and {len(keys) - 1:,} more)" if len(keys) > 1 else ""
        raise CheckpointFormatError(
            f"{file.path}: tensor {keys[0]!r}{more} has dtype {unknown[1]}, which the safetensors library does not "
            f"know. Convert it to a dtype of {', '.join(DTYPES)}."
        ) from error


def _refuse_duplicates(file: FileBytes, start: int, expected: int) -> None:
    """Refuse a key that occurs twice: the format forbids it, but the library lets the last one win."""
    header = file.head(start)[8:]
    if header.count(b'"data_offsets"') == expected:
        return
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{file.path}: the header is not JSON: {error}.") from error
    if repeated:
        raise CheckpointFormatError(f"{file.path}: the header has {repeated[0]!r} twice; save the file again.")
