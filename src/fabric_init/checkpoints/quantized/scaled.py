"""Weights of one byte each and scales beside them: float8 in blocks (DeepSeek-V3), rows or as a whole, and integers.

The values are those of compressed-tensors where its config is there (in the dtype of the scales), else the product in
float32. int8 of bitsandbytes has its own name for scales, and its own factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric_init.checkpoints.mapping.conversion_checks import shape_of
from fabric_init.checkpoints.quantized.weights import Quantized, Read, Stored, module_of, weights_of_groups
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box, full_box
from fabric_init.errors import CheckpointMismatchError

_SCALES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)
_OF_127 = 7.874015718698502e-3  # as bitsandbytes writes 1 / 127


@dataclass(frozen=True)
class Scaled:
    """A weight whose elements are multiplied by the scale of their block, after its zero point is taken off."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]
    """The weight, the scale, perhaps the zero point, and what is dropped with them."""
    blocks: Sequence[int]
    """How many elements of the weight a scale is for, in each dimension."""
    inner: torch.dtype
    """The dtype of the weight when it is multiplied."""
    zero: str | None = None

    def values(self, read: Read, box: Box) -> Tensor:
        weight, scale = self.sources[:2]
        result = read(weight, box).to(self.inner)
        if self.zero is not None:
            result = result - self._spread(read, self.zero, box).to(self.inner)
        return (result * self._spread(read, scale, box)).to(self.spec.dtype)

    def _spread(self, read: Read, key: str, box: Box) -> Tensor:
        """Return what is stored for each block, for each element of a box."""
        full = tuple(self.spec.shape)
        counts = [-(-size // block) for size, block in zip(full, self.blocks, strict=True)]
        if all(count == 1 for count in counts):
            return read(key, None).reshape((1,) * len(full))
        lows = [offset // block for offset, block in zip(box.offsets, self.blocks, strict=True)]
        ends = zip(box.offsets, box.sizes, self.blocks, strict=True)
        highs = [-(-(offset + size) // block) for offset, size, block in ends]
        part = read(key, Box(tuple(lows), tuple(high - low for low, high in zip(lows, highs, strict=True))))
        for dim, (offset, size, block) in enumerate(zip(box.offsets, box.sizes, self.blocks, strict=True)):
            part = part.index_select(dim, torch.arange(offset, offset + size, device="cpu") // block - lows[dim])
        return part


@dataclass(frozen=True)
class OfRows:
    """An int8 weight of bitsandbytes, with the largest number of each row."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]

    def values(self, read: Read, box: Box) -> Tensor:
        weight, largest = self.sources[:2]
        rows = read(largest, Box(box.offsets[:1], box.sizes[:1]))
        return read(weight, box) * rows.view(-1, 1) * _OF_127


def scaled(stored: Stored) -> list[Quantized]:
    """Return float8 weights, and int8 weights of compressed-tensors, with their scales."""
    return list(_scaled(stored))


def _scaled(stored: Stored) -> Iterator[Quantized]:
    compressed = stored.method == "compressed-tensors"
    for scale in stored.specs:
        ending = next((ending for ending in _SCALES if scale.endswith(ending)), "")
        key = scale.removesuffix(ending)
        spec = stored.specs.get(key)
        if not ending or spec is None:
            continue
        integer = compressed and spec.dtype == torch.int8
        if not integer and not (spec.dtype.is_floating_point and spec.dtype.itemsize == 1):
            continue
        zero = f"{key}_zero_point"
        there = zero if zero in stored.specs else None
        unused = f"{key.rpartition('weight')[0]}input_scale"
        more = [other for other in (zero, unused) if other in stored.specs]
        blocks = _blocks(stored, key, scale)
        dtype = stored.specs[scale].dtype if compressed else torch.float32
        yield Scaled(key, TensorSpec(spec.shape, dtype, _made(key, spec)), [key, scale, *more], blocks, dtype, there)


def _made(key: str, spec: TensorSpec) -> str:
    return f"made of {key} {shape_of(spec)}"


def _blocks(stored: Stored, key: str, scale: str) -> tuple[int, ...]:
    spec, scale_spec = stored.specs[key], stored.specs[scale]
    full, there = tuple(spec.shape), tuple(scale_spec.shape)
    number = scale_spec.dtype.is_floating_point
    if number and scale_spec.shape.numel() == 1:
        return full
    stated = stored.block or _stated(stored) or _BLOCK
    if stored.method == "compressed-tensors" and len(full) == len(there) == 2 and there[0] == full[0] and there[1]:
        stated = (1, -(-full[1] // there[1]))  # a group's size divides the row
    blocks = [*(1 for _ in full[:-2]), *map(int, stated)][-len(full) :] if full else []
    for dim, (count, size) in enumerate(zip(there, full, strict=False)):
        if count in (1, size):
            blocks[dim] = size // max(count, 1)
    if not number or there != tuple(-(-size // block) for size, block in zip(full, blocks, strict=True)):
        raise CheckpointMismatchError(
            f"{key} is {shape_of(spec)} and {scale} is {shape_of(scale_spec)} {scale_spec.dtype}: that is "
            f"no scale for each block of {tuple(stated)}, each row, or all of it"
        )
    return tuple(blocks)


def _stated(stored: Stored) -> Sequence[int] | None:
    """Return the size of blocks that the config states."""
    weights = [stored.config, *weights_of_groups(stored.config)]
    sizes = [each.get("weight_block_size") or each.get("block_structure") for each in weights]
    for size in sizes:
        if isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size):
            return size
    return None


def of_rows(stored: Stored) -> list[Quantized]:
    """Return the int8 weights of bitsandbytes."""
    found: list[Quantized] = []
    for key, spec in stored.specs.items():
        module = module_of(key, "SCB")
        weight = f"{module}weight"
        if module is None or weight not in stored.specs:
            continue
        there = stored.specs[weight]
        if there.dtype != torch.int8 or len(there.shape) != 2 or spec.shape != there.shape[:1]:
            raise CheckpointMismatchError(
                f"{weight} is {shape_of(there)} {there.dtype} and {key} is {shape_of(spec)}: those are no rows of int8"
            )
        layout = f"{weight}_format"
        more = [layout] if layout in stored.specs else []
        if more and int(stored.read(layout, full_box(stored.specs[layout].shape)).reshape(-1)[0]):
            raise CheckpointMismatchError(
                f"{weight} is in a layout for a GPU (bitsandbytes before 0.45): save it again with a newer release"
            )
        plain = TensorSpec(there.shape, torch.float32, _made(weight, there))
        found.append(OfRows(weight, plain, [weight, key, *more]))
    return found
