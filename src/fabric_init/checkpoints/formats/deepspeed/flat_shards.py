"""One tensor whose flattened values lie in several places, end to end: its parts on the ranks that saved it."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

import torch

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Region, Window, window


class Pieces:
    """1-D tensors of one dtype that, one after the other, hold a tensor of ``shape`` in row-major order.

    The last may go on after the tensor's end (padding). Raises ``ValueError`` when they are shorter than the tensor.
    """

    def __init__(self, shape: torch.Size, tensors: list[torch.Tensor]) -> None:
        # Empty pieces would have no place of their own.
        self._tensors = [tensor for tensor in tensors if tensor.numel()] or tensors[:1]
        self._starts = [0, *accumulate(tensor.numel() for tensor in self._tensors)]
        self.spec = TensorSpec(shape, self._tensors[0].dtype)
        if any(tensor.dtype != self.spec.dtype for tensor in self._tensors):
            raise ValueError(f"its parts have the dtypes {sorted({str(tensor.dtype) for tensor in self._tensors})}")
        if self._starts[-1] < math.prod(shape):
            raise ValueError(f"its parts hold {self._starts[-1]:,} elements, its shape {tuple(shape)} needs more")

    def parts(self) -> list[torch.Tensor]:
        """The tensors, the last without what goes on after the end."""
        numel = math.prod(self.spec.shape)
        inside = zip(self._tensors, self._starts, strict=False)
        return [part[: numel - start] for part, start in inside if start < numel]

    def read(self, region: Region | None) -> torch.Tensor:
        """The region: a view where it lies in one piece, else gathered into new memory."""
        wanted = window(self.spec.shape, region)
        one = self._view(wanted)
        if one is not None:
            return one
        out = torch.empty(wanted.sizes, dtype=self.spec.dtype, device="cpu")
        self._gather(out, wanted)
        return out

    def _view(self, wanted: Window) -> torch.Tensor | None:
        """The window of the one piece that it lies in."""
        index = min(bisect_right(self._starts, wanted.start) - 1, len(self._tensors) - 1)
        first = wanted.start - self._starts[index]
        if not wanted.extent:
            return self._tensors[0].new_empty(wanted.sizes)
        if first + wanted.extent > self._tensors[index].numel():
            return None
        tensor = self._tensors[index]
        return tensor.as_strided(wanted.sizes, wanted.strides, tensor.storage_offset() + first)

    def _gather(self, out: torch.Tensor, wanted: Window) -> None:
        """Fill the contiguous ``out``: by runs, each from one piece or across a border."""
        one = self._view(wanted)
        if one is not None:
            out.copy_(one)
        elif wanted.extent == out.numel():
            flat, at = out.view(-1), wanted.start
            while at < wanted.start + flat.numel():
                index = bisect_right(self._starts, at) - 1
                stop = min(self._starts[index + 1], wanted.start + flat.numel())
                part = self._tensors[index][at - self._starts[index] : stop - self._starts[index]]
                flat[at - wanted.start : stop - wanted.start] = part
                at = stop
        else:
            for row in range(wanted.sizes[0]):
                self._gather(
                    out[row], Window(wanted.start + row * wanted.strides[0], wanted.sizes[1:], wanted.strides[1:])
                )
