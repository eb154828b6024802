"""Read a strided window of a tensor by contiguous runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fabric_init.checkpoints.region import Window

ReadRun = Callable[[torch.Tensor, int], None]
"""Fill a contiguous CPU tensor, of any shape, with the elements from a number on."""


def gather(out: torch.Tensor, window: Window, read_run: ReadRun, scratch_bytes: int) -> None:
    """Fill the contiguous ``out`` with ``window``.

    Runs are read together with the gaps between them where all of it is small, since one read costs about as much as
    copying that much; otherwise row by row.

    Args:
        out: of the window's sizes.
        window: in elements.
        read_run: reads what is contiguous.
        scratch_bytes: how much to read for a part of ``out`` that is not contiguous in the file.
    """
    extent = window.extent
    if extent == out.numel():
        read_run(out, window.start)
    elif extent * out.element_size() <= scratch_bytes:
        scratch = torch.empty(extent, dtype=out.dtype, device="cpu")
        read_run(scratch, window.start)
        out.copy_(scratch.as_strided(window.sizes, window.strides))
    else:
        for row in range(window.sizes[0]):
            start = window.start + row * window.strides[0]
            gather(out[row], Window(start, window.sizes[1:], window.strides[1:]), read_run, scratch_bytes)
