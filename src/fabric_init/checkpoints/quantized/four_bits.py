"""The 4-bit weights of bitsandbytes (nf4, fp4), as transformers saves them, also with scales that are quantized too."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fabric_init.checkpoints.quantized.weights import Quantized, Read, Stored
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box, Span, take
from fabric_init.errors import CheckpointMismatchError

_STATE = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FourBits:
    """A weight of 4 bits an element, in blocks of the flat weight that have a largest number each."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]
    packed: TensorSpec
    block: int
    nested: tuple[int, float] | None
    """If the largest numbers are quantized too: the size of their blocks, and what is added to all."""

    def values(self, read: Read, box: Box) -> Tensor:
        row = math.prod(self.spec.shape[1:])
        start, stop = box.offsets[0] * row, (box.offsets[0] + box.sizes[0]) * row
        first, last = start // self.block, -(-stop // self.block)
        low, high = first * self.block, min(last * self.block, self.spec.shape.numel())
        each = 2 * self.packed.dtype.itemsize  # elements in one of what they are stored in
        stored = read(self.key, Span(low // each, -(-high // each))).contiguous().view(torch.uint8)
        indices = torch.stack((stored >> 4, stored & 0xF), -1).view(-1)[: high - low]
        numbers = read(f"{self.key}.quant_map", None)[indices.int()]
        largest = self._largest(read, first, last).repeat_interleave(self.block)[: high - low]
        values = (numbers * largest).to(self.spec.dtype)[start - low : stop - low]
        rows = values.view(box.sizes[0], *self.spec.shape[1:])
        return take(rows, Box((0, *box.offsets[1:]), box.sizes))

    def _largest(self, read: Read, first: int, last: int) -> Tensor:
        stored = read(f"{self.key}.absmax", Span(first, last))
        if self.nested is None:
            return stored.to(torch.float32)
        size, offset = self.nested
        outer = read(f"{self.key}.nested_absmax", Span(first // size, -(-last // size)))
        spread = outer[torch.arange(first, last, device="cpu") // size - first // size]
        return read(f"{self.key}.nested_quant_map", None)[stored.int()] * spread + torch.tensor(offset, device="cpu")


def four_bits(stored: Stored) -> list[Quantized]:
    """Return the 4-bit weights of bitsandbytes."""
    found: list[Quantized] = []
    for state in stored.specs:
        key = next((state.removesuffix(ending) for ending in _STATE if state.endswith(ending)), None)
        if key is None:
            continue
        names = [key, f"{key}.absmax", f"{key}.quant_map", f"{key}.nested_absmax", f"{key}.nested_quant_map"]
        sources = [name for name in (*names, state) if name in stored.specs]
        found.append(_weight(stored, key, state, sources))
    return found


def _weight(stored: Stored, key: str, state: str, sources: Sequence[str]) -> FourBits:
    try:
        said: dict[str, Any] = json.loads(bytes(stored.read(state, None).tolist()))
        shape, dtype, block = torch.Size(said["shape"]), _DTYPES[said["dtype"]], int(said["blocksize"])
        nested = None
        if f"{key}.nested_absmax" in sources:
            nested = int(said["nested_blocksize"]), float(said["nested_offset"])
        packed = stored.specs[key]
        count, blocks = shape.numel(), -(-shape.numel() // block)
        sizes = {f"{key}.absmax": blocks, f"{key}.quant_map": 16}
        if nested is not None:
            sizes |= {f"{key}.nested_absmax": -(-blocks // nested[0]), f"{key}.nested_quant_map": 256}
        wrong = [name for name, size in sizes.items() if stored.specs[name].shape.numel() != size]
        if packed.shape.numel() * packed.dtype.itemsize != -(-count // 2) or block % 32 or wrong:
            raise ValueError(f"the sizes of {', '.join(wrong) or key} are others")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatchError(f"{state} does not describe the tensors beside it: {error}") from None
    made = f"made of {key} {tuple(packed.shape)}"
    return FourBits(key, TensorSpec(shape, dtype, made), sources, packed, block, nested)
