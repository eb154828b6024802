"""Unwrap a user's model from the modules that Fabric and its strategies put around it."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fabric_init._lightning_internals import FabricModule

_wrappers: list[type[nn.Module]] = [FabricModule, DistributedDataParallel, FullyShardedDataParallel]


def register_wrapper(wrapper: type[nn.Module]) -> None:
    """Register a class of modules that keep the user's model as ``.module``."""
    if wrapper not in _wrappers:
        _wrappers.append(wrapper)


def original(model: nn.Module) -> nn.Module:
    """Return the module that the user built, without the wrappers of Fabric, its strategy and torch.compile."""
    while True:
        if isinstance(model, tuple(_wrappers)):
            model = cast(nn.Module, model.module)
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model
