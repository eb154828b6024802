"""DDP: every rank keeps every tensor whole, and all have the same values, so that none has to be sent."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import Strategy
from torch import nn

from fabric_init.filling.agreement import AllRanks
from fabric_init.filling.guard import settle
from fabric_init.filling.placement import Placement, WholeTensors
from fabric_init.filling.report import filled_by_us
from fabric_init.strategies.placement import register_placement


def _placement(strategy: DDPStrategy) -> Placement:
    return WholeTensors(strategy.root_device)


register_placement(DDPStrategy, _placement)


@contextmanager
def without_first_broadcast(strategy: Strategy, module: nn.Module) -> Iterator[None]:
    """Let DDP not send all weights from rank 0 when it wraps a model that the ranks have filled alike.

    They agreed on seed, checkpoint and plan; what a constructor took from elsewhere (numpy's random numbers, say)
    shows in a sample of each tensor. Every rank has to come here. A model that waits for values has nothing to send,
    and receiving would look like somebody had written it.
    """
    if not isinstance(strategy, DDPStrategy):
        yield
        return
    before = dict(strategy._ddp_kwargs)
    waits = bool(settle(module))
    mine = _sample(module, values=not waits) if waits or filled_by_us(module) else None
    if AllRanks().alike(mine):
        strategy._ddp_kwargs.setdefault("init_sync", False)
    try:
        yield
    finally:
        strategy._ddp_kwargs = before


def _sample(module: nn.Module, *, values: bool) -> str:
    """Name and shape of every tensor, and the values at its two ends, hashed."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        if values:
            flat = tensor.detach().reshape(-1)
            ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous()
            digest.update(bytes(ends.view(torch.uint8).numpy()))
    return digest.hexdigest()
