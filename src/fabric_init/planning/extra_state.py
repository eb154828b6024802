"""Extra state of modules (``get_extra_state``, ``set_extra_state``), as ``load_state_dict`` treats it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.planning.tensors import named_modules


class ExtraStateInfo(NamedTuple):
    """A module that takes extra state, and the names of its state in a state dict: several for a shared module."""

    module: nn.Module
    names: tuple[str, ...]


class Extra(NamedTuple):
    """The extra state of one module in a checkpoint, under ``key``."""

    module: nn.Module
    key: str
    reader: CheckpointReader


def takes_extra_state(module: nn.Module) -> bool:
    """Return whether the class of ``module`` overrides ``set_extra_state``."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def find_extra_states(model: nn.Module) -> list[ExtraStateInfo]:
    """Return the modules of ``model`` that take extra state."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for prefix, module in named_modules(model):
        if takes_extra_state(module):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE)
    return [ExtraStateInfo(module, tuple(names[key])) for key, module in modules.items()]
