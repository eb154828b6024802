"""Checksums of tensors, by which ranks see whether they hold the same values."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 17  # integers of eight bytes: what is computed of them stays in the cache
_ODD = 0x1E3779B97F4A7C15


def tensor_checksum(tensor: Tensor) -> str:
    """Return shape, dtype and a checksum over all elements, which no single change leaves as it was."""
    return f"{tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor.detach())}"


def _checksum(tensor: Tensor) -> int:
    """Return the sum of all bytes, eight at a time, each with an odd weight of its own."""
    held = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = held.numel() // 8 * 8
    aligned = held[:whole].clone() if held.data_ptr() % 8 else held[:whole]
    weights = torch.arange(min(_CHUNK, held.numel()), device=tensor.device).mul_(2).add_(1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, part in enumerate((*aligned.view(torch.int64).split(_CHUNK), held[whole:].to(torch.int64))):
        total += (part * weights[: part.numel()]).sum() * (_ODD + 2 * number)
    return int(total)
