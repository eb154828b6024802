"""Put a model into a state for measuring, and restore it afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import NormBase

_SEED = 0


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in this block with gradients and without noise; restore buffers, modes and random generators.

    Modules are in ``eval`` mode, which disables every kind of dropout. Batch normalization is not: at the start of
    training it uses the statistics of the batch, and its running statistics are not meaningful yet.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    values = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers if buffer is not None}
    try:
        for module, _ in modes:
            module.training = isinstance(module, NormBase)
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
