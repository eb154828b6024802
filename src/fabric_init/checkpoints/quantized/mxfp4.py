"""The experts of gpt-oss in mxfp4: numbers of 4 bits, 32 in a row with an exponent that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric_init.checkpoints.mapping.conversion_checks import shape_of
from fabric_init.checkpoints.quantized.weights import Quantized, Read, Stored
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box
from fabric_init.errors import CheckpointMismatchError

_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BYTES, _BLOCK, _BIAS = 16, 32, 127


@dataclass(frozen=True)
class MXFP4:
    """The weight of all experts, which has inputs before outputs, and is stored the other way round."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]

    def values(self, read: Read, box: Box) -> Tensor:
        blocks, scales = self.sources
        (expert, column, row), (experts, columns, rows) = box.offsets, box.sizes
        first, last = column // _BLOCK, -(-(column + columns) // _BLOCK)
        stored = read(blocks, Box((expert, row, first, 0), (experts, rows, last - first, _BYTES)))
        exponents = read(scales, Box((expert, row, first), (experts, rows, last - first))).to(torch.int32) - _BIAS
        numbers = torch.tensor(_NUMBERS, dtype=torch.float32, device="cpu")
        pairs = torch.stack((numbers[(stored & 0xF).int()], numbers[(stored >> 4).int()]), -1).flatten(-2)
        values = torch.ldexp(pairs, exponents.unsqueeze(-1)).to(self.spec.dtype).flatten(-2)
        return values.narrow(-1, column - first * _BLOCK, columns).transpose(1, 2)


def mxfp4(stored: Stored) -> list[Quantized]:
    """Return the weights of experts in mxfp4."""
    found: list[Quantized] = []
    for blocks, spec in stored.specs.items():
        key = blocks.removesuffix("_blocks")
        scales = f"{key}_scales"
        if key == blocks or scales not in stored.specs or spec.dtype != torch.uint8:
            continue
        there = stored.specs[scales]
        if (
            len(spec.shape) != 4
            or spec.shape[3] != _BYTES
            or there.shape != spec.shape[:3]
            or there.dtype != spec.dtype
        ):
            raise CheckpointMismatchError(
                f"{blocks} is {shape_of(spec)} and {scales} is {shape_of(there)} {there.dtype}: those are no blocks of "
                f"{_BLOCK} numbers with an exponent each"
            )
        shape = torch.Size((spec.shape[0], spec.shape[2] * _BLOCK, spec.shape[1]))
        made = f"made of {blocks} {shape_of(spec)}"
        found.append(MXFP4(key, TensorSpec(shape, torch.bfloat16, made), [blocks, scales]))
    return found
