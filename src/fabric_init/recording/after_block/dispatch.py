"""What happens to recorded tensors when no block is open: they are written, computed with, read, copied, or refuse.

[Note: after the block]
An operator that reaches a recorded tensor after its block goes one of these ways:

- it only asks for shapes, or makes a view: it runs on the meta device;
- it needs values that are all there (a rotary table in a closure, say): they are made there and then, once;
- it needs values that wait for a load: :class:`~fabric_init.errors.UninitializedTensorError`;
- it overwrites a whole tensor: the tensor gets memory and the value, unless a strategy has to shard it first;
- it writes a part of one, or computes one from others that wait: it is recorded, as in the block. A tensor that was
  written in parts counts as written when every element was; what is computed from a tensor that waits, waits as well.

So there is one path for writes in the block, after it, and by ``load_state_dict``, and none of it depends on hooks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction, DisableTorchFunctionSubclass
from fabric_init.errors import RecordingError
from fabric_init.recording.after_block.functions import HANDLERS
from fabric_init.recording.after_block.operators import AfterBlockOperators
from fabric_init.recording.after_block.recorder import LateRecorder
from fabric_init.recording.in_block.built_modules import notice_copies
from fabric_init.recording.in_block.meta_kernels import tensors_in
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.replay.tracing import is_faked, is_jit_traced, is_traced
from fabric_init.recording.tape.liveness import covers
from fabric_init.recording.tensor.recorded_tensor import (
    RecordedTensor,
    make_recorded_tensor,
    recorded,
    recorded_ref,
    whole_storage,
)

MSG_JIT_TRACE = (
    "torch.jit.trace has come to a tensor that was recorded and was not in real memory yet. Call "
    "fabric_init.materialize(model), or run the model once, before that."
)


class AfterBlock(AfterBlockOperators):
    """Answers for the recorded tensors of one tape when no block is open: this is what ``RecordedTensor`` calls."""

    def function(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call that torch shows to ``__torch_function__``."""
        with self._lock:  # no other thread may swap what C++ works on
            for tensor in tensors_in((args, kwargs.values())):
                self.make_plain(tensor)
            if is_traced():
                self._give_values(func, args, kwargs)
            with DisableTorchFunctionSubclass():
                handler = HANDLERS.get(func)
                if handler is not None:
                    return handler(self, func, args, kwargs)
                result = func(*args, **kwargs)
        returns_target = isinstance(result, RecordedTensor) and args and isinstance(args[0], Tensor)
        if returns_target and type(args[0]) is not type(result) and _writes_in_place(func.__name__):
            return args[0]  # it got memory, and became a plain tensor
        return result

    def _give_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the values that what traces a call would otherwise trace, too, or could not take."""
        for tensor in tensors_in((args, kwargs.values())):
            if isinstance(tensor, RecordedTensor):
                with real_execution():
                    if self.has_value(tensor):
                        self._finish(tensor)
                    elif is_faked() and func.__name__ != "__get__":
                        self.value(tensor, f"be used by {func.__name__}")
        if is_jit_traced() and func.__name__ != "__get__":
            raise RecordingError(MSG_JIT_TRACE)

    def text(self, tensor: RecordedTensor) -> str:
        """Return what ``print`` shows of ``tensor``: its values, if they are there."""
        found = recorded(tensor)
        if found is not None and found.memory is None and self.waiting.missing([found.storage]):
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            grad = ", requires_grad=True" if tensor.requires_grad else ""
            return f"tensor(no values yet, size={shape}, dtype={dtype}, device='{tensor.device}'{grad})"
        with DisableTorchFunction(), real_execution():
            real = self.value(tensor, "be printed").detach()
        return repr(real.requires_grad_(tensor.requires_grad) if tensor.is_leaf else real)

    def copy(self, tensor: RecordedTensor, memo: dict[Any, Any]) -> Tensor:
        """Return a deep copy, which waits if ``tensor`` does. Tensors that share memory have copies that share it."""
        if self.block_is_open:
            notice_copies(memo)
        with torch.no_grad():
            copied = self._copied(tensor, memo)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        else:
            copied.requires_grad_(tensor.requires_grad)
        if isinstance(copied, RecordedTensor):
            copied.__class__ = type(tensor)  # one of bitsandbytes, say, which quantizes itself
        for name, value in vars(tensor).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied

    def _copied(self, tensor: RecordedTensor, memo: dict[Any, Any]) -> Tensor:
        found = recorded(tensor)
        if found is None or found.memory is not None:
            return self.value(tensor, "be copied").clone()
        meta = tensor._meta
        ref = recorded_ref(tensor, found.storage)
        if covers(self.tape, ref):
            copied = tensor.detach().clone()
        else:
            key = ("fabric_init", found.storage)
            if key not in memo:
                memo[key] = self.elements(meta.untyped_storage(), meta.dtype).clone()
            copied = memo[key].view(meta.dtype).as_strided(meta.size(), meta.stride(), meta.storage_offset())
        return copied

    def elements(self, storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
        """Return a recorded tensor of ``dtype`` over all of a recorded storage."""
        with real_execution():
            flat = whole_storage(storage, dtype)
            found = recorded(flat)
            assert found is not None
            return make_recorded_tensor(flat, found.device)

    def constant(self, tensor: Tensor) -> Tensor:
        """Return a recorded tensor whose value is the real ``tensor``'s."""
        return LateRecorder(self.tape, self).constant(tensor)

    def intended_device(self, device: torch.device) -> Any:
        """Return a context in which memory that is asked for on meta is meant for ``device``."""
        return LateRecorder(self.tape, self).intended_device(device)


def _writes_in_place(name: str) -> bool:
    if name.endswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name.endswith("_")
