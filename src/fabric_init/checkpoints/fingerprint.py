"""A digest of a checkpoint, by which ranks make sure that they read the same one."""

from __future__ import annotations

import hashlib

import torch

from fabric_init.checkpoints import CheckpointReader, Span
from fabric_init.checkpoints.reader import read

_SAMPLED = 32  # tensors


def checkpoint_digest(reader: CheckpointReader | None) -> str:
    """Return a digest of a checkpoint's header, as converted, and of a sample of the file's values."""
    if reader is None:
        return "no checkpoint"
    keys = list(reader.keys())
    digest = hashlib.sha256("\n".join(f"{key} {reader.spec(key)}" for key in keys).encode())
    file: CheckpointReader = reader
    while (below := getattr(file, "below", None)) is not None:
        file = below
    in_file = list(file.keys())
    for key in in_file[:: max(1, len(in_file) // _SAMPLED)]:  # two files with one header: elements of some tensors
        numel = file.spec(key).shape.numel()
        ends = [read(file, key, Span(0, min(16, numel))), read(file, key, Span(max(0, numel - 16), numel))]
        digest.update(b"".join(bytes(end.contiguous().view(torch.uint8).numpy()) for end in ends if end.numel()))
    return f"{reader.path} with {len(keys)} tensors, fingerprint {digest.hexdigest()[:12]}"
