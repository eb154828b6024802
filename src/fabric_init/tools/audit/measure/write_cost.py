"""Measure the cost of init ops in plain PyTorch on this machine, once per rule and shape."""

from __future__ import annotations

import time
from typing import Any

import torch

from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.tape.op_properties import with_generator
from fabric_init.recording.tape.tape import Constant, Op, TensorRef

_SAMPLE = 1 << 18
"""The most elements to run an op on; the time of larger tensors is extrapolated."""

_CUBIC = frozenset({"orthogonal_"})  # a QR decomposition: elements × the shorter side


class WriteTimer:
    """Measure the seconds that an op takes on the CPU, on separate memory and with a separate random stream."""

    def __init__(self) -> None:
        self._known: dict[Any, float] = {}

    def seconds(self, op: Op) -> float:
        """Return the cost of ``op``: the faster of two runs on a sample, scaled up to its size."""
        size = _largest(op)
        key = (op.func, size, tuple(repr(value) for value in op.kwargs.values()))
        if key not in self._known:
            sample = _smaller(size)
            scale = size.numel() / max(sample.numel(), 1)
            if getattr(op.func, "__name__", "") in _CUBIC:
                scale *= min(size) / max(min(sample), 1)
            self._known[key] = scale * min(_timed(op, sample) for _ in range(2))
        return self._known[key]


def _largest(op: Op) -> torch.Size:
    refs = [*op.targets, *op.outputs, *op.refs()]
    return max((ref.size for ref in refs), key=torch.Size.numel, default=torch.Size())


def _smaller(size: torch.Size) -> torch.Size:
    sides = list(size)
    while torch.Size(sides).numel() > _SAMPLE:
        longest = sides.index(max(sides))
        sides[longest] = (sides[longest] + 1) // 2
    return torch.Size(sides)


def _timed(op: Op, sample: torch.Size) -> float:
    full = _largest(op)
    written = next(iter((*op.targets, *op.outputs)), None)
    dtype = torch.float32 if written is None else written.dtype
    generator = torch.Generator().manual_seed(0)

    def real(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return torch.zeros(sample if value.size == full else _smaller(value.size), dtype=value.dtype)
        if isinstance(value, Constant):
            return value.tensor.cpu()
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, (list, tuple)):
            return list(sample) if tuple(value) == tuple(full) else type(value)(real(item) for item in value)
        return value

    with real_execution():
        args, kwargs = [real(value) for value in op.args], {name: real(value) for name, value in op.kwargs.items()}
        func = op.func
        if op.draw is not None:
            func = with_generator(op.func) or _fill_uniform
            kwargs["generator"] = generator
        try:
            start = time.perf_counter()
            func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):  # an op on several shapes that do not shrink alike
            target = torch.zeros(sample, dtype=dtype)
            start = time.perf_counter()
            target.fill_(1)
        return time.perf_counter() - start


def _fill_uniform(*args: Any, generator: torch.Generator, **kwargs: Any) -> Any:
    """Replace an op that can only draw from the default generator of torch, which an audit leaves alone."""
    return torch.empty(args[0].size() if isinstance(args[0], torch.Tensor) else args[0]).uniform_(generator=generator)
