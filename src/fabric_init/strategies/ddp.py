"""DDP: every rank keeps full tensors with the same values, so that none has to be broadcast."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import lightning.fabric.strategies as lightning_strategies
import torch
from torch import nn

from fabric_init.distributed.agreement import RankGroup
from fabric_init.guard.hooks import refresh_state
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.reports.registry import filled_by_us
from fabric_init.strategies.mixin import DeferredInitMixin, register_strategy


class DDPStrategy(DeferredInitMixin, lightning_strategies.DDPStrategy):
    """Lightning's strategy of the same name; models built without values are filled on every rank, in its own memory.

    ``setup_module`` does without DDP's first broadcast of all weights where the ranks have filled the model alike: they
    agreed on seed, checkpoint and plan, and what a constructor took from elsewhere (numpy's random numbers, say) shows
    in a sample of each tensor. An uninitialized model has no values to send, and receiving would look like a write by
    the user.
    """

    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self.root_device)

    def setup_module(self, module: nn.Module) -> Any:
        options = self._ddp_kwargs
        is_unfilled = bool(refresh_state(module))
        sample = _sample(module, values=not is_unfilled) if is_unfilled or filled_by_us(module) else None
        if RankGroup().alike(sample):
            self._ddp_kwargs = {"init_sync": False} | options
        try:
            return super().setup_module(module)
        finally:
            self._ddp_kwargs = options


def _sample(module: nn.Module, *, values: bool) -> str:
    """Return a hash of the name and shape of every tensor, and of the values at its two ends."""
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        if values:
            flat = tensor.detach().reshape(-1)
            ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous()
            digest.update(bytes(ends.view(torch.uint8).numpy()))
    return digest.hexdigest()


register_strategy(DDPStrategy, instead_of=lightning_strategies.DDPStrategy)
