"""Declare that float8 weights are multiplied by the scales beside them, for models that compute with plain weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fabric_init.checkpoints.mapping.conversion_checks import Specs, shape_of
from fabric_init.checkpoints.mapping.convert import Made
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.errors import CheckpointMismatchError

_SCALES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class Dequantize:
    """Every float8 weight with ``weight_scale_inv`` or ``weight_scale`` beside it: ``convert=[Dequantize()]``.

    A scale is for a block of the weight (DeepSeek-V3), a row, or the whole. The product is computed in float32, and
    cast to the model's dtype. Scales of activations (``input_scale``) are dropped.

    Args:
        block: the rows and columns of a block: ``weight_block_size`` in the ``quantization_config`` of config.json.
    """

    block: Sequence[int] = (128, 128)

    def __post_init__(self) -> None:
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"Dequantize: block={self.block!r} should be the rows and columns of a block")

    def __str__(self) -> str:
        return "Dequantize()" if tuple(self.block) == (128, 128) else f"Dequantize(block={list(self.block)})"

    def made(self, specs: Specs) -> Iterator[Made]:
        found = False
        functions: dict[tuple[int, ...], partial[tuple[Tensor]]] = {}
        for key in specs:
            suffix = next((suffix for suffix in _SCALES if key.endswith(suffix)), "")
            weight = key.removesuffix(suffix)
            if suffix and weight in specs and _is_float8(specs[weight].dtype):
                blocks = self._blocks(weight, specs[weight], key, specs[key])
                function = functions.setdefault(blocks, partial(_scaled, blocks))
                unused = f"{weight.rpartition('weight')[0]}input_scale"
                yield Made([weight], [weight, key, *([unused] if unused in specs else [])], function)
                found = True
        if not found:
            raise CheckpointMismatchError("no float8 weight has weight_scale_inv or weight_scale beside it")

    def _blocks(self, weight: str, spec: TensorSpec, scale: str, scale_spec: TensorSpec) -> tuple[int, ...]:
        """Return how many elements of the weight a scale is for, in each of its dimensions."""
        there, full = tuple(scale_spec.shape), tuple(spec.shape)
        if scale_spec.dtype.is_floating_point and scale_spec.shape.numel() == 1:
            return full
        blocks = [*(1 for _ in full[:-2]), *self.block][-len(full) :] if full else []
        for dim, (count, size) in enumerate(zip(there, full, strict=False)):
            if count in (1, size):
                blocks[dim] = size // max(count, 1)
        if not scale_spec.dtype.is_floating_point or there != tuple(
            -(-size // block) for size, block in zip(full, blocks, strict=True)
        ):
            raise CheckpointMismatchError(
                f"{weight} is {shape_of(spec)} and {scale} is {shape_of(scale_spec)} {scale_spec.dtype}: that is "
                f"no scale for each block of {tuple(self.block)}, each row, or all of it"
            )
        return tuple(blocks)


def _scaled(blocks: tuple[int, ...], weight: Tensor, scale: Tensor, *unused: Tensor) -> tuple[Tensor]:
    scale = scale.to(torch.float32)
    if scale.numel() == 1:
        return (weight.to(torch.float32) * scale.view(()),)
    # each scale as often as its block is long in each dimension, as a view until it is copied
    apart = scale.view([size for count in scale.shape for size in (count, 1)])
    repeated = apart.expand([size for pair in zip(scale.shape, blocks, strict=True) for size in pair])
    whole = repeated.reshape([count * block for count, block in zip(scale.shape, blocks, strict=True)])
    for dim, size in enumerate(weight.shape):
        whole = whole.narrow(dim, 0, size)
    return (weight.to(torch.float32) * whole,)


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
