"""The recording mode: inside it, no init kernel runs and no memory is allocated for weights.

``RecordMode``, a ``TorchFunctionMode``, handles calls from Python: whole init functions, queries such as
``tensor.device``, and values that leave torch (``tolist``, ``numpy``). Below it the
:class:`~fabric_init.recording.in_block.recorder.Recorder` handles the aten ops that those calls dispatch.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from fabric_init import _log
from fabric_init._torch_internals import (
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
    get_current_function_mode_stack,
    no_grad_trunc_normal_,
    set_grad_enabled,
)
from fabric_init.recording.after_block.dispatch import AfterBlock
from fabric_init.recording.after_block.functions import asks_for_values, take_own_part
from fabric_init.recording.in_block import device_queries, from_python, memory_access, one_op, refused_calls
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.in_block.init_calls import init_call
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.in_block.tape_writer import Shards
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.replay.tracing import WithoutCompiling, hears_alone, not_compiled
from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS
from fabric_init.recording.tape.tape import Rng, Tape, check_rng
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, claim_all, recorded

# The init functions that call a function mode; the others are found by their frame on the stack.
_INIT_WITH_MODE: dict[str, Any] = {
    name: INIT_FUNCTIONS[name] for name in ("uniform_", "normal_", "constant_", "kaiming_uniform_")
}
_RECORDED_ALONE = (RecordedTensor,)
_TRUNC_NORMAL = no_grad_trunc_normal_.__code__
_logger = _log.channel("record")


class RecordMode(TorchFunctionMode):
    """Record how a model is built, and build it without values.

    Inside, tensors are on the meta device but report the device that the constructor asked for. Code that needs a
    value (``.item()``, ``.tolist()``, ``if t.any()``) gets the true one: that tensor alone is replayed.

    Args:
        rng: How random numbers are drawn at replay; see :func:`fabric_init.deferred_init`.
        agree: Maps the seed of this process to the one that all ranks use.
        skips_init: Whether the default generator is left where Lightning's ``empty_init=True`` leaves it.
        shards: What knows the DTensors that are made in the block; ``None`` refuses them.
    """

    def __init__(
        self,
        rng: Rng = "per_op",
        agree: Callable[[int], int] = int,
        *,
        skips_init: bool = False,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.tape = Tape(rng)
        self.recorder = Recorder(self.tape, agree, skips_init=skips_init, shards=shards)
        self.tape.after_block = AfterBlock(self.tape)
        self._eager = WithoutCompiling()
        self._opened = 0.0

    def __repr__(self) -> str:
        return f"<RecordMode: {self.tape.summary()}>"

    def __enter__(self) -> Self:
        self.recorder.__enter__()  # first, as it may raise: the other ranks are asked for the seed
        super().__enter__()  # type: ignore[no-untyped-call]
        self._eager.__enter__()
        _logger.debug("block opened, rng=%r", self.tape.rng)
        self._opened = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._eager.__exit__()
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self.recorder.__exit__(kind, error, trace)
        self.tape.after_block.block_is_open = False
        if _logger.isEnabledFor(logging.DEBUG):  # the summary of a large tape is not for free
            seconds, raised = time.perf_counter() - self._opened, "" if kind is None else f" by {kind.__name__}"
            _logger.debug("block closed%s after %.3f s: %s", raised, seconds, self.tape.summary())

    @not_compiled
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is set_grad_enabled:  # each torch.no_grad() asks twice
            return func(*args)
        if types and types != _RECORDED_ALONE and not all(issubclass(kind, Tensor) for kind in types):
            return func(*args, **(kwargs or {}))  # a proxy of torch.fx, say, which has an answer of its own
        if self.tape.has_plain:
            with real_execution():
                claim_all((args, (kwargs or {}).values()))
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self.recorder, func, args, kwargs or {})
        if type(func) is FunctionType and (original := _replaced(func, sys._getframe(2))) is not None:
            return _init_function(self.recorder, original, args, kwargs or {})
        if kwargs and kwargs.get("device") is not None:
            return device_queries.on_device_by_name(self.recorder, func, args, kwargs)
        try:
            if types == _RECORDED_ALONE or (types and all(issubclass(kind, RecordedTensor) for kind in types)):
                with DisableTorchFunctionSubclass():
                    return func(*args, **(kwargs or {}))
            return func(*args, **kwargs) if kwargs else func(*args)
        except RuntimeError as error:
            return one_op.read_memory(self.recorder, func, args, kwargs or {}, error)


# -- whole init functions ----------------------------------------------------------------------------------------------


def _replaced(func: FunctionType, calling: FrameType) -> FunctionType | None:
    """Return the init function that calls the mode, if it does so under another function's name.

    ``torch.nn.init`` looks up its own name to call a function mode. If that name was patched (transformers does so
    while it initializes), the mode receives the patch, although the original was called.
    """
    original = _INIT_WITH_MODE.get(func.__name__)
    return original if original is not None and calling.f_code is original.__code__ else None


def _init_function(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    options = dict(kwargs)
    tensor: Tensor = options.pop("tensor", None) if "tensor" in options else args[0]
    with DisableTorchFunction():
        whole = recorder.whole(tensor)
        if recorded(whole) is None or not _recordable(func, whole):
            return func(tensor, **options)  # plain PyTorch's warnings and errors
        recorder.add_init(func, whole, options, sys._getframe(2))
    return tensor


def _recordable(func: Any, tensor: Tensor) -> bool:
    if not tensor.numel():
        return False
    if func is torch.nn.init.kaiming_uniform_:
        return tensor.dim() >= 2
    return tensor.is_floating_point() or tensor.is_complex()


def _is_meta(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    with DisableTorchFunction():
        if not isinstance(recorder.whole(args[0]), RecordedTensor):
            return bool(args[0].is_meta)
        caller = sys._getframe(2)
        if asks_for_values(caller):
            take_own_part(caller, args[0], lambda part: False)
            return True
        if caller.f_code is _TRUNC_NORMAL and (init_frame := init_call(caller)) is not None:
            # torch skips sampling on meta, where its rejection loop could not run: record the whole call
            recorder.record_init_frame(init_frame)
            return True
    return False


def _is_number(value: Any) -> bool:
    """Return whether torch takes ``value`` as a number that fits; it has an error for integers of more than 64 bits."""
    return type(value) in (bool, float) or (type(value) is int and -(2**63) <= value < 2**63)


def _filling(op: Any) -> Handler:
    """Return a handler that writes ``op``, an in-place fill, to the tape without going through the dispatcher."""

    def handler(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if not isinstance(tensor, RecordedTensor):
            return func(*args, **kwargs)
        with DisableTorchFunction():
            refused = torch.is_grad_enabled() and tensor.requires_grad  # plain PyTorch may have an error for that
            found = recorder.lookup(tensor)
            has_number = all(_is_number(value) for value in args[1:])
            if found and found.memory is None and has_number and not (kwargs or refused) and hears_alone(recorder):
                return recorder.fill(op, args, {}, sys._getframe(2))
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    return handler


_HANDLERS: dict[Any, Handler] = {
    Tensor.fill_: _filling(torch.ops.aten.fill_.Scalar),
    Tensor.zero_: _filling(torch.ops.aten.zero_.default),
    **dict.fromkeys(_INIT_WITH_MODE.values(), _init_function),
    Tensor.is_meta.__get__: _is_meta,  # type: ignore[attr-defined]
    **device_queries.HANDLERS,
    **from_python.HANDLERS,
    **memory_access.HANDLERS,
    **one_op.HANDLERS,
    **refused_calls.HANDLERS,
}


def active() -> RecordMode | None:
    """Return the recording that is open in this thread, or ``None``."""
    return next((mode for mode in reversed(get_current_function_mode_stack()) if isinstance(mode, RecordMode)), None)


@contextmanager
def recorded_build(rng: Rng = "per_op", shards: Shards | None = None) -> Iterator[Tape]:
    """Record what is built in this block; a block inside another one continues the outer recording.

    Args:
        rng: How random numbers are drawn at replay; see :func:`fabric_init.deferred_init`.
        shards: What knows the DTensors that are made in the block; ``None`` refuses them.

    Yields:
        The tape.

    Raises:
        RecordingError: A constructor in the block does something that cannot be recorded.
    """
    check_rng(rng)
    if (outer := active()) is not None:
        yield outer.tape
        return
    with RecordMode(rng, shards=shards) as mode:
        yield mode.tape
