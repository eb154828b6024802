"""A model's own load code, which ``load_state_dict`` runs: overrides and hooks of its modules."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fabric_init._torch_internals import NormBase
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import metadata_of
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.record import Outcome
from fabric_init.planning.tensors import Walk

_HOOK_TABLES = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def has_load_code(walk: Walk, names: Collection[str]) -> bool:
    """Return whether loading a state dict with these ``names`` runs code of the model's own."""
    if _is_own(walk.model, "load_state_dict"):
        return True
    for prefix, module in walk.named:
        if takes_extra_state(module):
            return True
        for table in _HOOK_TABLES:
            hooks = vars(module).get(table)
            if hooks and not all(map(_is_ours, hooks.values())):
                return True
        if _is_own(module, "_load_from_state_dict") and not _is_idle_norm(prefix, module, names):
            return True
    return False


def takes_extra_state(module: nn.Module) -> bool:
    """Return whether the class of ``module`` overrides ``set_extra_state``."""
    return type(module).set_extra_state is not nn.Module.set_extra_state


def _is_own(module: nn.Module, method: str) -> bool:
    return method in vars(module) or getattr(type(module), method) is not getattr(nn.Module, method)


def _is_idle_norm(prefix: str, module: nn.Module, names: Collection[str]) -> bool:
    """Return whether this is torch's batch norm, whose load code only adds a counter that old files lack."""
    if type(module)._load_from_state_dict is not NormBase._load_from_state_dict:
        return False
    counter = f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked"
    return module._buffers.get("num_batches_tracked") is None or counter in names


class ModuleCode:
    """Loads a state dict as ``load_state_dict`` does.

    Args:
        reader: The checkpoint, of which the state dict's metadata is taken.
    """

    replaces = True

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        """Load ``state``.

        Raises:
            CheckpointMismatchError: ``load_state_dict`` reports an error, such as a tensor of another shape.
        """
        given: OrderedDict[str, Any] = OrderedDict(state)
        metadata = metadata_of(self._reader)
        if metadata is not None:
            given._metadata = metadata  # type: ignore[attr-defined]  # as state_dict() keeps it
        load: Any = model.load_state_dict
        options: dict[str, Any] = {"strict": False} if _takes(load, "strict") else {}
        with _without_our_hooks(model):
            try:
                result = load(given, **options)
            except RuntimeError as error:
                if "Error(s) in loading state_dict" not in str(error):
                    raise
                raise CheckpointMismatchError(f"{self._reader.path}: {error}") from error
        missing, unexpected = getattr(result, "missing_keys", None), getattr(result, "unexpected_keys", ())
        return Outcome(None if missing is None else frozenset(missing), tuple(unexpected))


def _takes(function: Any, argument: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == argument or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _is_ours(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)  # torch keeps a pre-hook in a wrapper
    return str(getattr(inner, "__module__", "")).startswith("fabric_init.")


@contextmanager
def _without_our_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which the hooks that guard models without values do not see the load."""
    kept = []
    for module in model.modules():
        for name in _HOOK_TABLES:
            table = vars(module).get(name, {})
            if any(map(_is_ours, table.values())):
                kept.append((table, OrderedDict(table)))
                for key in [key for key, hook in table.items() if _is_ours(hook)]:
                    del table[key]
    try:
        yield
    finally:
        for table, hooks in kept:
            table.clear()
            table.update(hooks)
