"""What of torch watches operators run, to trace or to transform them, and how values are made outside of it.

A value that is made while ``torch.jit.trace``, ``torch.export``, ``make_fx`` or a transform of ``torch.func`` watches
would become a part of what they trace, or a wrapper of theirs. ``torch.compile`` reads Python code instead of watching
operators; our code is not for it to read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ClassVar, TypeVar, cast

import torch

from fabric_init._torch_internals import (
    DispatchModeKey,
    FrameAction,
    FrameExecStrategy,
    TorchDispatchMode,
    functorch_stack,
    get_dispatch_mode,
    get_dispatch_mode_at,
    get_tracing_state,
    graph_break,
    len_dispatch_mode_stack,
    len_function_mode_stack,
    set_code_exec_strategy,
    set_tracing_state,
)

_Answer = TypeVar("_Answer", bound=Callable[..., Any])


def is_faked() -> bool:
    """Return whether operators run on fake tensors now, which take none of another kind beside them."""
    return get_dispatch_mode(DispatchModeKey.FAKE) is not None or get_dispatch_mode(DispatchModeKey.PROXY) is not None


def is_jit_traced() -> bool:
    """Return whether ``torch.jit.trace`` runs, which holds its inputs and the tensors of its module from C++."""
    return get_tracing_state() is not None


def is_traced() -> bool:
    """Return whether something watches operators run."""
    return is_jit_traced() or functorch_stack.peek_interpreter_stack() is not None or is_faked()


def hears_alone(mode: TorchDispatchMode) -> bool:
    """Return whether nothing but ``mode``, the innermost of those that hear of operators, would hear of one now."""
    depth = len_dispatch_mode_stack()
    return depth > 0 and get_dispatch_mode_at(depth - 1) is mode and not len_function_mode_stack() and not is_traced()


class OutsideTracing:
    """Context in which neither ``torch.jit.trace`` nor a transform of ``torch.func`` hears of operators that run."""

    def __enter__(self) -> None:
        self._state = get_tracing_state()
        self._layers: list[Any] = []
        while functorch_stack.peek_interpreter_stack() is not None:
            self._layers.append(functorch_stack.pop_dynamic_layer_stack())
        if self._state is not None:
            set_tracing_state(None)

    def __exit__(self, *error: object) -> None:
        if self._state is not None:
            set_tracing_state(self._state)
        while self._layers:
            functorch_stack.push_dynamic_layer_stack(self._layers.pop())


class WithoutCompiling:
    """Context in which compiled functions run as they are written, and are not compiled.

    It is for all threads, as torch's own setting is. What is first compiled inside, when nothing was before, is skipped
    by ``torch.compile`` for good: its import takes longer than that of all of this package.
    """

    _lock = threading.Lock()
    _open: ClassVar[int] = 0
    _stance: ClassVar[Any]

    def __enter__(self) -> None:
        self._is_set = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
        with self._lock:
            if self._is_set and WithoutCompiling._open == 0:
                WithoutCompiling._stance = torch.compiler.set_stance("force_eager")
            WithoutCompiling._open += self._is_set

    def __exit__(self, *error: object) -> None:
        with self._lock:
            WithoutCompiling._open -= self._is_set
            if self._is_set and WithoutCompiling._open == 0:
                WithoutCompiling._stance.__exit__(None, None, None)


def not_compiled(function: _Answer) -> _Answer:
    """Let Python run ``function``, and what that calls, where ``torch.compile`` would compile them by themselves."""
    strategy = FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP)
    set_code_exec_strategy(cast(FunctionType, function).__code__, strategy)
    return function


def never_compiled(answer: _Answer) -> _Answer:
    """Let Python run ``answer``, which a tensor subclass gives torch, where ``torch.compile`` would compile it.

    Compiled code is cut in two there, and the second part sees the plain tensors that ``answer`` has made.
    ``torch.compiler.disable`` would do the same, but its import takes longer than that of all of this package.
    """

    @wraps(answer)
    def run(cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_dynamo_compiling():  # it reads this function as a part of another one
            graph_break()
        return answer(cls, func, types, args, kwargs)

    return cast(_Answer, not_compiled(run))
