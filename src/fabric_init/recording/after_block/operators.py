"""Operators on recorded tensors when no block is open: which run on values, which write, which are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.errors import RecordingError
from fabric_init.recording.after_block.make_values import AfterBlockValues
from fabric_init.recording.after_block.recorder import LateRecorder
from fabric_init.recording.in_block.meta_kernels import map_tensors, tensors_in, written_tensors
from fabric_init.recording.replay.replay import real_execution, view
from fabric_init.recording.tape.liveness import covers, never_written
from fabric_init.recording.tape.op_properties import INDEXES, asks_shape_only, has_out, only_copies, overwrites, traits
from fabric_init.recording.tape.tape import TensorRef
from fabric_init.recording.tensor.geometry import view_in_place
from fabric_init.recording.tensor.real_memory import plain_memory
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become, recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag

_OF_ALL_RANKS = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
"""Namespaces of collectives, which are never run again later, when the other ranks are elsewhere."""

_FOREACH: dict[Any, Any] = {
    torch.ops.aten._foreach_copy_.default: torch.ops.aten.copy_.default,
    torch.ops.aten._foreach_zero_.default: torch.ops.aten.zero_.default,
}


class AfterBlockOperators(AfterBlockValues):
    """Answers operators, and does what they write. See [Note: after the block] in ``dispatch.py``."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer an operator."""
        if func is torch.ops.aten.empty_like.default:  # to_empty(): no values either, so it waits for the same ones
            func = torch.ops.aten._to_copy.default
        with self._lock, DisableTorchFunction():
            if traits(func).view_in_place and recorded(args[0]) is not None:
                return view_in_place(func, args, kwargs)
            if traits(func).view and self._is_open(args[0]):
                return self._record(func, args, kwargs)
            tensors = list(tensors_in((args, kwargs.values())))
            if not any(self._is_open(tensor) for tensor in tensors):
                return self._run(func, args, kwargs)
            written = written_tensors(func, args, kwargs)
            if func in _FOREACH:
                for each in zip(*(value for value in args if isinstance(value, (list, tuple))), strict=True):
                    _FOREACH[func](*each)
                return None
            if any(not isinstance(tensor, RecordedTensor) for tensor in written):
                return self._run(func, args, kwargs)
            if written:
                return self._write(func, args, kwargs, written)
            does = traits(func)
            if does.random and not self._missing(tensors):
                return self._run(func, args, kwargs)  # draws now, from the user's generator, as in plain PyTorch
            if does.random and asks_shape_only(func):
                return func(*map_tensors(args, self._same_shape), **kwargs)
            if does.data_dependent or does.name == "aten::_local_scalar_dense" or func.namespace in _OF_ALL_RANKS:
                return self._run(func, args, kwargs)
            if any(recorded(tensor) is None and tensor.dim() > 0 for tensor in tensors) and (
                does.name not in INDEXES or not self._missing(tensors)
            ):
                return self._run(func, args, kwargs)
            return self._record(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` on values; raises if some wait."""
        given: dict[int, Tensor] = {}

        def real(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, RecordedTensor):
                return tensor
            value = plain_memory(tensor) if recorded(tensor) is None else self.value(tensor, _use_of(func))
            given[id(value)] = tensor
            return value

        real_args, real_kwargs = map_tensors((args, kwargs), real)
        written = [(value, _geometry(value)) for value in written_tensors(func, real_args, real_kwargs)]
        result = func(*real_args, **real_kwargs)
        for value, before in written:
            if id(value) in given and _geometry(value) != before:  # set_, resize_, or out= of another shape
                become(given[id(value)], value, alone=True)
        return map_tensors(result, lambda tensor: given.get(id(tensor), tensor))

    def _same_shape(self, tensor: Tensor) -> Tensor:
        """Return a tensor like one that waits, for what asks for nothing but its shape, dtype and device."""
        if not isinstance(tensor, RecordedTensor):
            return tensor
        with real_execution():
            meta = tensor._meta
            return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=tensor._claimed)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with DisableTorchDispatch():
            result = LateRecorder(self.tape, self).record_op(func, args, kwargs)
        if only_copies(func) and isinstance(result, RecordedTensor):  # a cast takes the place of what was cast
            old, new = recorded(args[0]), recorded(result)
            if old is not None and new is not None:
                self.waiting.rename(old.storage, new.storage)
        if traits(func).unfilled and isinstance(result, RecordedTensor):  # to_empty: what lies there is no value either
            old, new = recorded(args[0]), recorded(result)
            if old is not None and new is not None and self.waiting.missing([old.storage]):
                self.waiting.begin(new.storage, *self.waiting.names.get(old.storage, ("", "")))
                self.waiting.rename(old.storage, new.storage)
        return result

    # -- writes --------------------------------------------------------------------------------------------------------

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]) -> Any:
        if func is torch.ops.aten.copy_.default and self._is_same(args[0], args[1]):
            return args[0]  # load_state_dict of a model's own state dict: nothing is written
        if not traits(func).changes_geometry and any(recorded_ref(tensor, -1).expanded for tensor in written):
            raise RuntimeError(  # as torch, and before anything is recorded
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location. Please clone() the tensor before performing the operation."
            )
        storages = [found.storage for tensor in written if (found := recorded(tensor)) is not None]
        unwritten = any(self._is_open(t) and self._never_written(t) for t in written)
        read = list(tensors_in((args, kwargs.values())))
        others = [t for t in read if all(t is not w for w in written) or sum(t is other for other in read) > 1]
        late = self._missing(others)
        has_values = not late and not unwritten and not self.waiting.missing(storages)
        if has_values and (self.gives_memory or not self._to_be_sharded(storages)):
            if _writes_nothing(func, written):  # FSDP2 pads a shard without elements like this: it is one afterwards
                return self._record(func, args, kwargs)
            return self._run(func, args, kwargs)
        if has_out(func):
            return self._write_out(func, args, kwargs, written)
        if traits(func).name == "aten::set_" and len(args) > 1 and not isinstance(args[1], RecordedTensor):
            return self._set(args)
        target, found = written[0], recorded(written[0])
        assert found is not None
        ref = recorded_ref(target, found.storage)
        whole = len(written) == 1 and overwrites(func) and covers(self.tape, ref)
        if whole and not late and self.gives_memory:
            return self._write_through(func, args, kwargs, target, found, ref)
        if traits(func).random and overwrites(func) and self.gives_memory and not late:
            drawn = func(self._same_shape(target), *args[1:], **kwargs)  # now, from the user's generator
            return self.dispatch(torch.ops.aten.copy_.default, (target, drawn), {})
        result = self._record(func, args, kwargs)
        if func is torch.ops.aten.copy_.default and late and (source := recorded(args[1])) is not None:
            self.waiting.rename(source.storage, found.storage)  # FSDP2 pads a shard like this
        if not set(late) & set(storages):  # what is computed from its own old values still waits for those
            for tensor in written:
                self.waiting.note(func, args, kwargs, tensor)
        if self.gives_memory and not self.waiting.missing(storages):
            for tensor in written:
                self.value(tensor, "be read")
        elif whole and not late:
            self.waiting.note_status(found.storage, self.status)
        return result

    def _write_through(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Tensor,
        found: StorageTag,
        ref: TensorRef,
    ) -> Any:
        """Give a tensor that is overwritten whole its memory, and write there."""
        info = self.tape.storages[found.storage]
        with real_execution():
            memory = torch.empty(info.nbytes, dtype=torch.uint8, device=info.device).untyped_storage()
            held = view(memory, ref)
        real_args, real_kwargs = map_tensors(
            (args, kwargs),
            lambda t: held if t is target else self.value(t, "be read") if recorded(t) is not None else t,
        )
        func(*real_args, **real_kwargs)
        self._has_values(found, memory)
        return target

    def _write_out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]) -> Any:
        """Run ``func(…, out=t)``: on memory of its own first, since it may have another shape than ``t``."""
        made: dict[int, Tensor] = {}

        def other(tensor: Tensor) -> Tensor:
            if all(tensor is not target for target in written):
                return tensor
            with real_execution():
                made[id(tensor)] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return made[id(tensor)]

        self._run(func, args, {name: map_tensors(value, other) for name, value in kwargs.items()})
        for target in written:
            value = made[id(target)]
            if value.size() != target.size():
                raise RecordingError(
                    f"out= is a tensor of shape {tuple(target.size())} that waits for values, and the result is of "
                    f"shape {tuple(value.size())}. Give a tensor of that shape, or assign the result."
                )
            self.dispatch(torch.ops.aten.copy_.default, (target, value), {})
        return written[0] if len(written) == 1 else tuple(written)

    def _set(self, args: tuple[Any, ...]) -> Tensor:
        """Run ``t.set_(…)``: ``t`` takes the memory that it is given, and its values."""
        target: Any = args[0]
        with real_execution():
            value = torch.empty(0, dtype=target.dtype, device=target._claimed).set_(*args[1:])
        self.replace(target, value)
        return args[0]  # type: ignore[no-any-return]

    def _is_same(self, one: Tensor, other: Any) -> bool:
        found, its = recorded(one), recorded(other) if isinstance(other, Tensor) else None  # or a number
        if found is None or its is None or found.storage != its.storage:
            return False
        return recorded_ref(one, found.storage) == recorded_ref(other, its.storage)

    def _never_written(self, tensor: Tensor) -> bool:
        found = recorded(tensor)
        return found is not None and never_written(self.tape, recorded_ref(tensor, found.storage))

    def _to_be_sharded(self, storages: Iterable[int]) -> bool:
        return any(storage in self.waiting.names for storage in storages)


def _writes_nothing(func: Any, written: Iterable[Tensor]) -> bool:
    return not (traits(func).changes_geometry or has_out(func) or any(tensor.numel() for tensor in written))


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    storage = None if tensor.layout != torch.strided else tensor.untyped_storage()._cdata
    return storage, tensor.size(), tensor.stride() if storage is not None else None, tensor.storage_offset()


def _use_of(func: Any) -> str:
    return f"be used by {func.overloadpacket.__name__}" if hasattr(func, "overloadpacket") else "be used"
