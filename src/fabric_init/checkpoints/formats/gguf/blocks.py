"""The types of tensors in GGUF files: plain numbers, or blocks of a row that are quantized together.

The package ``gguf``, llama.cpp's own, knows the blocks; plain numbers are read without it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PLAIN = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
_AT_ONCE = 1 << 18  # elements that are dequantized together: what that takes beside the result stays small


class GgmlType(NamedTuple):
    """How the elements of a tensor are stored."""

    code: int
    name: str
    dtype: torch.dtype
    """Of the values."""
    block: int
    """Elements that are stored together."""
    bytes: int
    """Of one block."""

    @property
    def plain(self) -> bool:
        """Whether elements are stored as they are."""
        return self.code in _PLAIN


@cache
def ggml_type(code: int) -> GgmlType:
    """Return the type with this number.

    Raises:
        ModuleNotFoundError: it is quantized, and the package ``gguf`` is not installed.
        ValueError: the package does not know it, or has no way to dequantize it.
    """
    if code in _PLAIN:
        name, dtype = _PLAIN[code]
        return GgmlType(code, name, dtype, 1, dtype.itemsize)
    gguf = _package(code)
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), kind)
    except (ValueError, KeyError):
        raise ValueError(f"is of type {code}, which the installed gguf does not know: pip install -U gguf") from None
    except NotImplementedError:
        raise ValueError(f"is {kind.name}, which the installed gguf cannot dequantize: pip install -U gguf") from None
    return GgmlType(code, kind.name, torch.float32, block, size)


def dequantized(blocks: Tensor, kind: GgmlType) -> Tensor:
    """Return the values, in float32, of rows of blocks, whose last dimension is bytes."""
    import numpy

    gguf = _package(kind.code)
    rows = blocks.reshape(-1, blocks.shape[-1])
    out = torch.empty(len(rows), blocks.shape[-1] // kind.bytes * kind.block, dtype=kind.dtype, device="cpu")
    count = max(1, _AT_ONCE // max(1, out.shape[-1]))
    for first in range(0, len(rows) if out.numel() else 0, count):
        some = rows[first : first + count].contiguous().numpy()
        with numpy.errstate(all="ignore"):  # scales of a damaged file may be anything: so are the values then
            values = gguf.quants.dequantize(some, gguf.GGMLQuantizationType(kind.code))
        out[first : first + count] = torch.from_numpy(values)
    return out.view(*blocks.shape[:-1], out.shape[-1])


def _package(code: int) -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"is quantized (type {code}); the package gguf dequantizes it: pip install gguf", name="gguf"
        ) from None
    return gguf
