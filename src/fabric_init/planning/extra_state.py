"""What modules save beside tensors: ``get_extra_state`` and ``set_extra_state``, as ``load_state_dict`` treats them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.planning.tensors import named_modules


class ExtraStateInfo(NamedTuple):
    """A module that takes extra state, and the names of that in a state dict: several for a shared module."""

    module: nn.Module
    names: tuple[str, ...]


class Extra(NamedTuple):
    """Extra state that a checkpoint has for a module, under ``key``."""

    module: nn.Module
    key: str
    reader: CheckpointReader


def takes_extra_state(module: nn.Module) -> bool:
    """Whether its class has a ``set_extra_state`` of its own."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def find_extra_states(model: nn.Module) -> list[ExtraStateInfo]:
    """The modules of ``model`` that take extra state."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for prefix, module in named_modules(model):
        if takes_extra_state(module):
            modules[id(module)] = module
            names.setdefault(id(module), []).append(f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE)
    return [ExtraStateInfo(module, tuple(names[key])) for key, module in modules.items()]


def extra_states(reader: CheckpointReader) -> Mapping[str, Any]:
    """By checkpoint key, the extra state that is no tensor; formats of tensors alone have none."""
    found: Mapping[str, Any] = getattr(reader, "extra_state", {})
    return found
