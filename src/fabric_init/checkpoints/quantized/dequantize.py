"""Declare that quantized weights are made plain ones when they are read, for models that compute with plain weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fabric_init.checkpoints.quantized.config import quantization_config
from fabric_init.checkpoints.quantized.four_bits import four_bits
from fabric_init.checkpoints.quantized.gptq_awq import gptq_or_awq, pack_quantized
from fabric_init.checkpoints.quantized.mxfp4 import mxfp4
from fabric_init.checkpoints.quantized.reader import DequantizedReader
from fabric_init.checkpoints.quantized.scaled import of_rows, scaled
from fabric_init.checkpoints.quantized.torchao import torchao
from fabric_init.checkpoints.quantized.weights import Quantized, Scheme, Stored
from fabric_init.checkpoints.reader import CheckpointReader, fields_of, read
from fabric_init.errors import CheckpointMismatchError

_SCHEMES: Sequence[Scheme] = (scaled, of_rows, four_bits, pack_quantized, gptq_or_awq, torchao, mxfp4)


@dataclass(frozen=True)
class Dequantize:
    """Every quantized weight, as a plain one: ``convert=[Dequantize()]``.

    How weights are quantized is told by their keys, and by ``quantization_config`` in the config.json beside them:
    float8 with ``weight_scale_inv`` or ``weight_scale`` (for a block, a row or the whole), bitsandbytes (nf4, fp4,
    int8), compressed-tensors (packed integers, int8, float8), GPTQ, AWQ, torchao (int8, float8) and mxfp4 (gpt-oss).
    Values are those that the library gives which has written them, cast to the model's dtype. Scales of activations
    (``input_scale``) are dropped.

    Args:
        block: The rows and columns of a block of float8 weights; by default ``weight_block_size`` of the config, or
            128 × 128.
    """

    block: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.block is not None and (len(self.block) != 2 or min(self.block) < 1):
            raise ValueError(f"Dequantize: block={self.block!r} should be the rows and columns of a block")

    def __str__(self) -> str:
        return "Dequantize()" if self.block is None else f"Dequantize(block={list(self.block)})"

    def opened(self, below: CheckpointReader) -> DequantizedReader:
        """Return the checkpoint with plain weights. Of values, only what describes weights is read.

        Raises:
            CheckpointMismatchError: No weight is quantized in a known way, or one is as is not supported.
        """
        specs = {key: below.spec(key) for key in below.keys()}
        config = quantization_config(below.path)
        stored = Stored(specs, config, lambda key, region: read(below, key, region), fields_of(below), self.block)
        found: dict[str, Quantized] = {}
        for scheme in _SCHEMES:
            for weight in scheme(stored):
                if weight.key in found or (weight.key in specs and weight.key not in weight.sources):
                    raise CheckpointMismatchError(f"{weight.key} is there more than once")
                found[weight.key] = weight
        if not found:
            method = f"; config.json says {stored.method}" if stored.method else ""
            raise CheckpointMismatchError(f"no weight is quantized in a way that is known here{method}")
        return DequantizedReader(below, found)
