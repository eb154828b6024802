"""One tensor whose flattened values lie end to end in several vectors: its shards on the ranks that saved it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Region, window
from fabric_init.checkpoints.storage.strided_window import gather

_SCRATCH_BYTES = 1 << 20

ReadValues = Callable[[torch.Tensor], torch.Tensor]
"""Return the values of a tensor on the meta device."""


class FlatShards:
    """Vectors of one dtype that, one after the other, hold a tensor of ``shape`` in row-major order.

    The last may reach beyond the tensor's end (padding). They are on the meta device; ``read``
    gets a function that reads their values.

    Raises:
        ValueError: they are shorter than the tensor, or of several dtypes.
    """

    def __init__(self, shape: torch.Size, vectors: list[torch.Tensor]) -> None:
        # Empty vectors would have no position of their own.
        self._vectors = [vector for vector in vectors if vector.numel()] or vectors[:1]
        self._starts = [0, *accumulate(vector.numel() for vector in self._vectors)]
        self.spec = TensorSpec(shape, self._vectors[0].dtype)
        if any(vector.dtype != self.spec.dtype for vector in self._vectors):
            raise ValueError(f"its parts have the dtypes {sorted({str(vector.dtype) for vector in self._vectors})}")
        if self._starts[-1] < math.prod(shape):
            raise ValueError(f"its parts hold {self._starts[-1]:,} elements, its shape {tuple(shape)} needs more")

    def parts(self) -> list[torch.Tensor]:
        """Return the vectors, the last without its padding."""
        numel = math.prod(self.spec.shape)
        inside = zip(self._vectors, self._starts, strict=False)
        return [part[: numel - start] for part, start in inside if start < numel]

    def read(self, region: Region | None, values: ReadValues) -> torch.Tensor:
        """Return the region: mapped where it lies in one vector of a mapped file, else gathered into new memory."""
        part = window(self.spec.shape, region)
        if not part.extent:
            return torch.empty(part.sizes, dtype=self.spec.dtype, device="cpu")
        index = bisect_right(self._starts, part.start) - 1
        vector, first = self._vectors[index], part.start - self._starts[index]
        if first + part.extent <= vector.numel():
            return values(vector.as_strided(part.sizes, part.strides, int(vector.storage_offset()) + first))
        out = torch.empty(part.sizes, dtype=self.spec.dtype, device="cpu")

        def read_run(target: torch.Tensor, start: int) -> None:
            flat, at, stop = target.view(-1), start, start + target.numel()
            while at < stop:
                index = bisect_right(self._starts, at) - 1
                end = min(self._starts[index + 1], stop)
                run = self._vectors[index][at - self._starts[index] : end - self._starts[index]]
                flat[at - start : end - start] = values(run)
                at = end

        gather(out, part, read_run, _SCRATCH_BYTES)
        return out
