"""A strided window of a tensor as contiguous runs, and the memory of a tensor as bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch

from fabric_init.checkpoints.region import Window

ReadRun = Callable[[torch.Tensor, int], None]
"""Fill a contiguous CPU tensor, of any shape, with the elements from a number on."""


def memory(tensor: torch.Tensor) -> memoryview:
    """Return the writable bytes of a contiguous CPU tensor; ``Tensor.numpy`` knows neither bfloat16 nor fp8."""
    assert tensor.data_ptr() or not tensor.nbytes, "a tensor without memory"
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy as many bytes as ``source`` has, while other threads run, which an assignment to a memoryview holds up."""
    if source.readonly:
        target[: len(source)] = source
        return
    assert len(source) <= len(target)
    kind = ctypes.c_char * len(source)
    ctypes.memmove(kind.from_buffer(target), kind.from_buffer(source), len(source))


def is_dense(window: Window, gap: int) -> bool:
    """Return whether no gap in the window is of more than so many elements."""
    inside = 1
    for count, stride in zip(reversed(window.sizes), reversed(window.strides), strict=True):
        if count > 1:
            if stride - inside > gap:
                return False
            inside += (count - 1) * stride
    return True


def runs(window: Window, gap: int) -> Iterator[tuple[int, int]]:
    """Yield the elements from the first to after the last of each run; gaps of up to so many elements are in it."""
    if not window.extent:
        return
    if is_dense(window, gap):
        yield window.start, window.start + window.extent
        return
    dim = next(dim for dim, count in enumerate(window.sizes) if count > 1)
    for index in range(window.sizes[dim]):
        sizes = (*window.sizes[:dim], 1, *window.sizes[dim + 1 :])
        yield from runs(Window(window.start + index * window.strides[dim], sizes, window.strides), gap)


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
