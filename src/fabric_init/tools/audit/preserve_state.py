"""A model in a state fit for measuring, and afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_SEED = 0


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in this block with gradients and without noise; its buffers, modes and the generators come back.

    Everything is in ``eval`` mode, which switches dropout off however it is written. Normalization by batch is not: at
    the start of training it takes the batch's own statistics, and its running ones say nothing yet.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers if buffer is not None}
    try:
        for module, _ in modes:
            module.training = isinstance(module, _NormBase)
        with torch.random.fork_rng(devices=_devices(model)), torch.enable_grad():
            torch.default_generator.manual_seed(_SEED)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
                if buffer is not None and not torch.equal(buffer, values[id(buffer)]):
                    buffer.copy_(values[id(buffer)])


def _devices(model: nn.Module) -> list[torch.device]:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device for tensor in tensors if tensor.is_cuda}, key=str)
