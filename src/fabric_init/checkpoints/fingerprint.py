"""Digests of a checkpoint, by which ranks make sure that they read the same one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fabric_init.checkpoints import CheckpointReader, Span, TensorSpec
from fabric_init.checkpoints.reader import read
from fabric_init.checkpoints.storage.remote import RemoteBytes, RemotePath
from fabric_init.checkpoints.tensor_checksums import tensor_checksum

_READ_AT_ONCE = 1 << 26  # bytes


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
    if isinstance(path, RemotePath):
        remote = getattr(_in_file(reader), "shard_paths", [path])
        return " ".join(f"{each.name} {RemoteBytes(each).version}" for each in remote)
    folder = path if path.is_dir() else path.parent
    try:
        files = sorted(folder.iterdir()) if path.is_dir() or path.name.endswith(".json") else [path]
        return " ".join(file_digest(file) for file in files if file.is_file())
    except OSError:
        return None


def file_digest(file: Path) -> str:
    """Return such a text for one local file."""
    status = os.stat(file)
    return f"{file.name} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def content_checksums(reader: CheckpointReader, share: int, shares: int) -> dict[str, str]:
    """Return checksums of the values in the file, by tensor and part of it: one of several shares of them all.

    Args:
        reader: The open checkpoint.
        share: Which share.
        shares: How many there are: one for each rank that reads the same files.
    """
    file = _in_file(reader)
    parts = [
        (key, start, min(start + step, numel), step < numel)
        for key in file.keys()
        for numel, step in [_numel_and_step(file.spec(key))]
        for start in range(0, numel, step)
    ]
    return {
        f"{key}[{start}:{stop}]" if is_part else key: tensor_checksum(read(file, key, Span(start, stop)))
        for key, start, stop, is_part in parts[share::shares]
    }


def _numel_and_step(spec: TensorSpec) -> tuple[int, int]:
    return spec.shape.numel(), max(1, _READ_AT_ONCE // spec.dtype.itemsize)


def _in_file(reader: CheckpointReader) -> CheckpointReader:
    """Return the reader of the file, below those that convert it."""
    while (below := getattr(reader, "below", None)) is not None:
        reader = below
    return reader
