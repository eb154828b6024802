"""Find the models that a block built: modules registered in it that are children of no other module."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from types import CodeType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from typing_extensions import Self

from fabric_init.errors import RecordingError
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor
from fabric_init.recording.tensor.wrappers import note_registered


class BuiltModules:
    """Context manager that collects the modules built in it by this thread.

    Those that their constructors build are found by torch's registration hooks; deep copies, which run no constructor,
    by their tensors (:func:`notice_copies`).
    """

    open_ones: ClassVar[list[BuiltModules]] = []

    def __init__(self) -> None:
        self._seen: dict[int, weakref.ref[nn.Module]] = {}  # by id, in order, so that ranks agree
        self._originals: dict[int, weakref.ref[nn.Module]] = {}  # of deep copies, by the id of the copy
        self._thread = threading.get_ident()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        ):
            self._hooks.callback(register(self._notice).remove)
        BuiltModules.open_ones.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        BuiltModules.open_ones.remove(self)
        self._hooks.close()

    def _notice(self, module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        known = self._seen.get(id(module))
        if known is None or known() is not module:
            self._see(module)
        if isinstance(value, Tensor):
            note_registered(value, module._parameters.get(name))

    def _see(self, module: nn.Module) -> None:
        known = self._seen.get(id(module))
        if known is not None:
            if known() is module:
                return
            del self._seen[id(module)]  # of a module that is gone
            self._originals.pop(id(module), None)
        self._seen[id(module)] = weakref.ref(module)

    def notice_copy(self, copied: nn.Module, original: int) -> None:
        """Notice a deep copy of the module whose id is ``original``."""
        if threading.get_ident() == self._thread:
            self._see(copied)
            if original in self._seen:
                self._originals[id(copied)] = self._seen[original]

    def roots(self) -> list[nn.Module]:
        """Return the models: modules that no other module of the block holds, registered or in a list, dict or object.

        What a module only keeps in one of these is no part of its ``state_dict``, and no model of its own. Neither is a
        deep copy of a module that is still there: it has the values of that one.
        """
        found = self._unregistered()
        if len(found) > 1 or self._originals:
            del found
            gc.collect()  # a module that was built and dropped may live on in a reference cycle
            found = self._unregistered()
        return _without_kept(found)

    def _unregistered(self) -> list[nn.Module]:
        seen = [module for reference in self._seen.values() if (module := reference()) is not None]
        child_ids: set[int] = set()
        visited, pending = set(map(id, seen)), seen
        while pending:  # also through modules of an earlier block, whose submodules this block may have replaced
            children = [child for module in pending if module._modules for child in module._modules.values()]
            child_ids.update(map(id, children))
            new = {id(child): child for child in children if child is not None and id(child) not in visited}
            pending = list(new.values())
            visited.update(new)
        copies = {copied for copied, original in self._originals.items() if original() is not None}
        return [module for module in seen if id(module) not in child_ids and id(module) not in copies]


def notice_copies(memo: dict[Any, Any]) -> None:
    """Notice the modules that ``copy.deepcopy`` is making, which ``memo`` holds, while it copies a tensor of one.

    Those that were there at the tensor before are known, or are held by others that are.
    """
    new = itertools.islice(reversed(memo.items()), len(memo) - memo.get(_COPIES_SEEN, 0))
    copies = [(original, copied) for original, copied in new if isinstance(copied, nn.Module)]
    for original, copied in reversed(copies):
        for built in BuiltModules.open_ones:
            built.notice_copy(copied, original)
    memo[_COPIES_SEEN] = len(memo)


_COPIES_SEEN = "fabric_init: how much of this memo was seen"


def refuse_scripted(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise if one of these ``modules`` of a model was scripted or traced while its tensors had no values.

    TorchScript keeps tensors of its own behind its modules, in whose places no values can be put.

    Raises:
        RecordingError: naming the submodule.
    """
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule) and any(
            isinstance(tensor, RecordedTensor)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        ):
            raise RecordingError(
                f"{name or 'the model'} ({module.original_name}) was scripted or traced with torch.jit in a recorded "
                "block, where its tensors have no values. Do that after the block, to the filled model: "
                f"{'model' if not name else 'model.' + name} = torch.jit.script(…)."
            )


def _without_kept(modules: list[nn.Module]) -> list[nn.Module]:
    """Return those of ``modules`` that no other one keeps. Two that keep each other are two models."""
    if len(modules) < 2:
        return modules
    kept = {id(module): _reachable(module) for module in modules}
    return [
        module
        for module in modules
        if all(id(module) not in kept[id(other)] or id(other) in kept[id(module)] for other in modules)
    ]


def _reachable(module: nn.Module) -> set[int]:
    """Return the ids of the modules that ``module`` reaches through attributes, containers, partials and closures."""
    work: list[Any] = [module]
    seen: set[int] = set()
    while work:
        value = work.pop()
        if id(value) in seen or isinstance(value, _NO_WAY):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            work += [value.__closure__, value.__defaults__, value.__kwdefaults__]  # not all globals of its file
        else:
            work += gc.get_referents(value)
    return seen


# What leads to everything there is, or to no module at all.
_NO_WAY = (type, ModuleType, FrameType, CodeType, Tensor, str, bytes, int, float, complex, type(None))
