"""Which models a block built: the modules registered in it that are part of no other."""

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
    """Context that notices the modules built in it, by this thread, through torch's registration hooks."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()  # in order: ranks agree
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
        """The models: modules that no other module of the block holds."""
        roots = self._roots()
        if len(roots) > 1:
            gc.collect()  # a module that was built and dropped may live on in a reference cycle
            roots = self._roots()
        return roots

    def _roots(self) -> list[nn.Module]:
        seen = list(self._seen.keys())
        held: set[int] = set()
        below, visited = list(seen), set()
        while below:  # also through modules of an earlier block, which this one has changed further down
            module = below.pop()
            if id(module) not in visited:
                visited.add(id(module))
                children = list(module.children())
                held.update(map(id, children))
                below += children
        return [module for module in seen if id(module) not in held]
