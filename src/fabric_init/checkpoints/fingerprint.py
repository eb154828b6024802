"""Digests of a checkpoint, by which ranks make sure that they read the same one."""

from __future__ import annotations

import hashlib
import os

import torch

from fabric_init.checkpoints import CheckpointReader, Span
from fabric_init.checkpoints.reader import read
from fabric_init.checkpoints.storage.remote import RemoteBytes, RemotePath

_READ_WHOLE = 1 << 26
"""Bytes up to which all of a checkpoint is compared; of a larger one, parts of every tensor."""
_PARTS, _ELEMENTS = 6, 16


def header_digest(reader: CheckpointReader) -> str:
    """Return a text for a checkpoint's path and its header, as converted."""
    keys = list(reader.keys())
    digest = hashlib.sha256("\n".join(f"{key} {reader.spec(key)}" for key in keys).encode())
    return f"{reader.path} with {len(keys)} tensors, header {digest.hexdigest()[:12]}"


def files_digest(reader: CheckpointReader) -> str | None:
    """Return a text that ranks have in common if they read the very same files; ``None`` if that cannot be seen.

    Inodes and times are those of one file system: two copies never have all of them in common.
    """
    path = reader.path
    if isinstance(path, RemotePath):  # of an index, the shards are not asked
        return None if path.name.endswith(".json") or not path.suffix else RemoteBytes(path).version
    folder = path if path.is_dir() else path.parent
    try:
        files = sorted(folder.iterdir()) if path.is_dir() or path.name.endswith(".json") else [path]
        found = [(file.name, os.stat(file)) for file in files if file.is_file()]
    except OSError:
        return None
    return " ".join(f"{name} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in found)


def content_digest(reader: CheckpointReader) -> str:
    """Return a digest of the values in the file: all of them if that is cheap, else some of every tensor."""
    file = _in_file(reader)
    keys = list(file.keys())
    digest = hashlib.sha256()
    specs = [file.spec(key) for key in keys]
    whole = sum(spec.shape.numel() * spec.dtype.itemsize for spec in specs) <= _READ_WHOLE
    for key, spec in zip(keys, specs, strict=True):
        numel = spec.shape.numel()
        step = numel if whole else _ELEMENTS
        starts = range(0, numel, step or 1) if whole else sorted(_starts(numel))
        for start in starts:
            values = read(file, key, Span(start, min(start + step, numel)))
            digest.update(bytes(values.contiguous().view(torch.uint8).numpy()))
    return f"{reader.path} with {len(keys)} tensors, content {digest.hexdigest()[:12]}"


def _starts(numel: int) -> set[int]:
    """Return where the parts of a tensor begin: at both ends, and between."""
    last = max(0, numel - _ELEMENTS)
    return {last * part // (_PARTS - 1) for part in range(_PARTS)} if numel else set()


def _in_file(reader: CheckpointReader) -> CheckpointReader:
    """Return the reader of the file, below those that convert it."""
    while (below := getattr(reader, "below", None)) is not None:
        reader = below
    return reader
