"""What Fabric and its strategies put around a user's model, and how to come back to it."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fabric_init._lightning_internals import FabricModule

_wrappers: list[type[nn.Module]] = [FabricModule, DistributedDataParallel, FullyShardedDataParallel]


def register_wrapper(wrapper: type[nn.Module]) -> None:
    """A class of modules that keep the user's model as ``.module``."""
    if wrapper not in _wrappers:
        _wrappers.append(wrapper)


def original(model: nn.Module) -> nn.Module:
    """The module that the user built, without what Fabric, its strategy and torch.compile put around it."""
    while True:
        if isinstance(model, tuple(_wrappers)):
            model = cast(nn.Module, model.module)
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model
