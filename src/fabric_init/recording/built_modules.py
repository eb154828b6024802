"""Find the models that a block built: modules registered in it that are children of no other module."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from typing_extensions import Self


class BuiltModules:
    """Context manager that collects the modules built in it by this thread, through torch's registration hooks."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[nn.Module, None] = (
            weakref.WeakKeyDictionary()
        )  # ordered, so that ranks agree
        self._thread = threading.get_ident()
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for register in (
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
            register_module_module_registration_hook,
        ):
            self._hooks.callback(register(self._notice).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    def _notice(self, module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == self._thread:
            self._seen.setdefault(module)

    def roots(self) -> list[nn.Module]:
        """Return the modules of the block that are not part of another one, in the order they were built."""
        roots = self._roots()
        if len(roots) > 1:
            gc.collect()  # a discarded module may still be alive in a reference cycle
            roots = self._roots()
        return roots

    def _roots(self) -> list[nn.Module]:
        seen = list(self._seen.keys())
        child_ids: set[int] = set()
        pending, visited = list(seen), set()
        while pending:  # also through modules of an earlier block, whose submodules this block may have replaced
            module = pending.pop()
            if id(module) not in visited:
                visited.add(id(module))
                children = list(module.children())
                child_ids.update(map(id, children))
                pending += children
        return [module for module in seen if id(module) not in child_ids]
