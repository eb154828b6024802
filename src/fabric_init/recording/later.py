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
import gc
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import compress
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import (
    DisableTorchDispatch,
    DisableTorchFunction,
    DisableTorchFunctionSubclass,
)
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.recording.call_site import caller
from fabric_init.recording.kept_values import KeptValues
from fabric_init.recording.later_calls import HANDLERS
from fabric_init.recording.liveness import covers, never_written
from fabric_init.recording.meta_kernels import map_tensors, tensors_in, written_tensors
from fabric_init.recording.op_schemas import INDEXES, asks_shape_only, has_out, only_copies, overwrites, traits
from fabric_init.recording.real_memory import plain_memory, real_tensor
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.replay import real_execution, storage_now, view
from fabric_init.recording.rng import LateStreams
from fabric_init.recording.storage_tags import Recorded, ref_of
from fabric_init.recording.tape import Tape, TensorRef
from fabric_init.recording.tensor import (
    FormerTensor,
    RecordedTensor,
    become,
    meta_of,
    recorded,
    recorded_tensor,
    whole_storage,
)
from fabric_init.recording.tracing import is_faked, is_jit_traced, is_traced
from fabric_init.recording.waiting import Waiting, uninitialized


class Owners(Protocol):
    """Where the tensors of a living model are, by recorded storage."""

    def model(self) -> nn.Module | None:
        """Return the model, if it still lives."""
        ...

    def has(self, storage: int) -> bool:
        """Return whether a tensor of the model was on ``storage``."""
        ...

    def now(self, storage: int) -> Iterator[Tensor]:
        """Yield what is today where tensors on ``storage`` were."""
        ...

    def at(self, module: nn.Module, name: str) -> Iterator[int]:
        """Yield the storages that the tensor ``name`` of ``module`` was on."""
        ...

    def recorded(self, storage: int) -> Iterator[Tensor]:
        """Yield those of them that are still on ``storage``."""
        ...

    def filled(self, storage: int, status: str) -> None:
        """Note that what was on ``storage`` has its values, and what it is reported as."""
        ...

    def put(self, storage: int, tensor: Tensor, value: Tensor) -> None:
        """Give ``tensor``, which was on ``storage``, the memory of ``value``, or what its strategy keeps of that."""
        ...

    def unfilled(self) -> tuple[str, dict[int, str]]:
        """Return the class of the model, and the names of its tensors that wait, by recorded storage."""
        ...


class LateRecorder(Recorder):
    """Writes ops that come after the block to the tape. It is no active mode: :class:`Later` calls it."""

    def __init__(self, tape: Tape, later: Later) -> None:
        super().__init__(tape)
        self.later = later
        self.streams = LateStreams(tape)  # type: ignore[assignment]
        self.recognizes_init_calls = False

    def true_value(self, tensor: Tensor) -> Tensor:
        return self.later.value(tensor, "be read")

    def _note_look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note nothing: what is seen after the block is there already, and no load will bring other values."""

    def constant_value(self, value: Tensor) -> Any:
        loaded = not self.later.gives_memory and self.later.status == "loaded"
        return self.later.kept.keep(value, by_reference=loaded)


class Later:
    """Answers for the recorded tensors of one tape when no block is open.

    Attributes:
        gives_memory: whether a tensor that is written gets memory at once; a strategy that shards first wants it later.
        status: what a tensor that gets values now is reported as.
        block_is_open: whether the block that records the tape is open.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = weakref.ref(tape)  # the tape has this object: no cycle keeps a recording alive
        self.gives_memory = True
        self.status = "written by the user"
        self.block_is_open = True
        self.waiting = Waiting(tape)
        self.owners: list[Owners] = []
        self.kept = KeptValues()
        self._lock = threading.RLock()
        self._finishes = False

    @property
    def tape(self) -> Tape:
        """The tape of the tensors that this answers for."""
        tape = self._tape()
        assert tape is not None
        return tape

    def join(self, later: Later) -> None:
        """Hand everything over to the answers for a later tape, which continues this one's."""
        later.gives_memory = later.gives_memory and self.gives_memory
        later.owners += self.owners
        later.kept.join(self.kept)
        later.waiting.join(self.waiting)

    # -- what RecordedTensor calls -------------------------------------------------------------------------------------

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

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer an operator."""
        if func is torch.ops.aten.empty_like.default:  # to_empty(): no values either, so it waits for the same ones
            func = torch.ops.aten._to_copy.default
        with self._lock, DisableTorchFunction():
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

    def value(self, tensor: Tensor, use: str) -> Tensor:
        """Return the values of ``tensor``, on real memory, which is made once, when no block is open any more.

        Raises:
            UninitializedTensorError: they wait for a load, or nothing ever wrote them.
        """
        found = recorded(tensor)
        if found is None:
            return tensor
        with self._lock:
            ref = ref_of(tensor._meta, found.storage)  # type: ignore[attr-defined]
            if found.memory is None and not self.waiting.missing([found.storage]) and never_written(self.tape, ref):
                raise UninitializedTensorError(
                    f"a tensor of shape {tuple(tensor.shape)} cannot {use}: it was made by torch.empty or "
                    "the like, and nothing has written values there. Write it, or load it."
                )
            if found.memory is None and self.block_is_open and not self.waiting.missing([found.storage]):
                with real_execution():  # what the block computes from it goes on being recorded
                    return view(self._replayed(found), ref)
            self.memory(found, use)
            return real_tensor(found, ref)

    def memory(self, found: Recorded, use: str) -> torch.UntypedStorage:
        """Return the memory of a recorded storage with its values.

        Raises:
            UninitializedTensorError: they wait for a load.
        """
        with self._lock:
            if found.memory is None:
                if missing := self.waiting.missing([found.storage]):
                    self.refuse(use, [found.storage, *missing])
                self._has_values(found, self._replayed(found))
            assert found.memory is not None
            return found.memory[0]

    def _replayed(self, found: Recorded) -> torch.UntypedStorage:
        memory, random = storage_now(self.tape, found.storage, exact=self.tape.rng == "eager")
        if random:
            self.tape.sealed_rng = self.tape.rng
        return memory

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
        with torch.no_grad():
            copied = self._copied(tensor, memo)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        else:
            copied.requires_grad_(tensor.requires_grad)
        for name, value in vars(tensor).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        return copied

    def _copied(self, tensor: RecordedTensor, memo: dict[Any, Any]) -> Tensor:
        found = recorded(tensor)
        if found is None or found.memory is not None:
            return self.value(tensor, "be copied").clone()
        meta = tensor._meta
        ref = ref_of(meta, found.storage)
        if covers(self.tape, ref):
            copied = tensor.detach().clone()
        else:
            key = ("fabric_init", found.storage)
            if key not in memo:
                memo[key] = recorded_tensor(whole_storage(meta), tensor._claimed).clone()
            copied = memo[key].view(meta.dtype).as_strided(meta.size(), meta.stride(), meta.storage_offset())
        return copied

    def refuse(self, use: str, storages: Iterable[int]) -> NoReturn:
        """Raise with the names of all that waits in the model of these ``storages``, and how to give it values.

        Raises:
            UninitializedTensorError: always.
        """
        asked = list(storages)
        for owners in reversed(self.owners):
            model, names = owners.unfilled()
            if any(storage in names for storage in asked):
                break
        else:
            model, names = self._names_of_parts(asked)
        raise UninitializedTensorError(uninitialized(model, use, list(dict.fromkeys(names.values())), self.waiting.fix))

    def _names_of_parts(self, asked: Sequence[int]) -> tuple[str, dict[int, str]]:
        """The names of what waits of a model that is gone, but for parts that are used elsewhere."""
        known = self.waiting.names
        model = next((known[storage][0] for storage in asked if storage in known), None)
        if model is None:
            return "a tensor that was computed from others", {0: "(it is in no model)"}
        alive = [s for s, (other, _) in known.items() if other == model and (s in asked or self.tape.is_alive(s))]
        return model, {s: known[s][1] for s in alive if s in asked or self.waiting.missing([s])}

    # -- what the handlers of the block call, too ----------------------------------------------------------------------

    def true_value(self, tensor: Tensor) -> Tensor:
        """Return the values of ``tensor``."""
        return self.value(tensor, "be read")

    def look_at(self, tensor: Tensor, use: str = "be read") -> Tensor:
        """Return the values of ``tensor`` for Python to see; in a block, a load may bring others."""
        value, found = self.value(tensor, use), recorded(tensor)
        if self.block_is_open and found is not None and found.memory is None:
            self.tape.add_look(None, (ref_of(meta_of(tensor), found.storage),), {}, caller(sys._getframe(1)))
        return value

    def constant(self, tensor: Tensor) -> Tensor:
        """Return a recorded tensor whose value is the real ``tensor``'s."""
        return LateRecorder(self.tape, self).constant(tensor)

    def intended_device(self, device: torch.device) -> Any:
        """Return a context in which memory that is asked for on meta is meant for ``device``."""
        return LateRecorder(self.tape, self).intended_device(device)

    # -- ways --------------------------------------------------------------------------------------------------------

    def _is_open(self, tensor: Tensor) -> bool:
        found = recorded(tensor)
        return found is not None and found.memory is None

    def _missing(self, tensors: Iterable[Tensor]) -> list[int]:
        open_ones = [found.storage for t in tensors if (found := recorded(t)) is not None and found.memory is None]
        return self.waiting.missing(open_ones)

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

    def replace(self, target: Tensor, value: Tensor) -> None:
        """Let ``target`` have the memory of ``value`` and no more to do with its recorded storage."""
        found = recorded(target)
        become(target, value, alone=True)
        if found is None or any(True for owners in self.owners for _ in owners.recorded(found.storage)):
            return  # only an alias of a tensor that goes on waiting
        if self.waiting.filled(found.storage):
            self.waiting.note_status(found.storage, self.status)

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

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]) -> Any:
        if func is torch.ops.aten.copy_.default and self._is_same(args[0], args[1]):
            return args[0]  # load_state_dict of a model's own state dict: nothing is written
        if not traits(func).changes_geometry and any(ref_of(meta_of(tensor), -1).expanded for tensor in written):
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
            return self._run(func, args, kwargs)
        if has_out(func):
            return self._write_out(func, args, kwargs, written)
        if traits(func).name == "aten::set_" and len(args) > 1 and not isinstance(args[1], RecordedTensor):
            return self._set(args)
        target, found = written[0], recorded(written[0])
        assert found is not None
        ref = ref_of(target._meta, found.storage)  # type: ignore[attr-defined]
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

    def _is_same(self, one: Tensor, other: Tensor) -> bool:
        found, its = recorded(one), recorded(other)
        if found is None or its is None or found.storage != its.storage:
            return False
        return ref_of(meta_of(one), found.storage) == ref_of(meta_of(other), its.storage)

    def _never_written(self, tensor: Tensor) -> bool:
        found = recorded(tensor)
        return found is not None and never_written(self.tape, ref_of(tensor._meta, found.storage))  # type: ignore[attr-defined]

    def _to_be_sharded(self, storages: Iterable[int]) -> bool:
        return any(storage in self.waiting.names for storage in storages)

    def _write_through(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor, found: Recorded, ref: TensorRef
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

    def _has_values(self, found: Recorded, memory: torch.UntypedStorage) -> None:
        found.memory = memory, 0
        if self.waiting.filled(found.storage) or self._replaces_one_that_waited(found.storage):
            self.waiting.note_status(found.storage, self.status)
        for owners in self.owners:
            for tensor in list(owners.recorded(found.storage)):
                self.make_plain(tensor)
            owners.filled(self.waiting.origin(found.storage), self.status)

    def _replaces_one_that_waited(self, storage: int) -> bool:
        """Return whether a cast or ``to_empty`` has put ``storage`` in the place of one that waited; copies do not."""
        origin = self.waiting.origin(storage)
        waited = origin in self.waiting.names and origin not in self.waiting.statuses
        if origin == storage or not waited:
            return False
        while storage not in self.waiting.parts and storage != origin:  # a whole tensor may be kept beside its shard
            storage = self.waiting.before(storage)
            if storage not in self.waiting.parts and self.tape.is_alive(storage):
                return False  # FSDP2 keeps a view of a shard that was emptied
        return True

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Turn recorded tensors whose values can be made by now into plain ones: these, and those kept elsewhere."""
        with self._lock:
            if self._finishes:  # a value that is made there completes a model
                return
            self._finishes = True
            try:
                for tensor in tensors:
                    self._finish(tensor)
                if any(self.tape.is_alive(storage) for storage in self.tape.records):  # the search is worth its time
                    for each in _all_recorded():
                        with suppress(RecordingError):  # all ranks have to read it together: its user is told so
                            self._finish(each)
            finally:
                self._finishes = False

    def _finish(self, tensor: Tensor) -> None:
        found = recorded(tensor)
        if found is None or found.tape is not self.tape or isinstance(tensor, FormerTensor) or _has_graph(tensor):
            return
        if self.has_value(tensor):
            self.value(tensor, "be read")
            self.make_plain(tensor)

    def has_value(self, tensor: Tensor) -> bool:
        """Return whether nothing is missing for the values of a recorded ``tensor``."""
        found = recorded(tensor)
        if found is None or found.memory is not None:
            return found is not None
        unwritten = never_written(self.tape, ref_of(meta_of(tensor), found.storage))
        return not unwritten and not self.waiting.missing([found.storage])

    def make_plain(self, tensor: Tensor) -> None:
        """Turn a recorded tensor whose values are there into a plain one, which stays the same object."""
        with self._lock, DisableTorchFunction():
            if not isinstance(tensor, RecordedTensor) or isinstance(tensor, FormerTensor):
                return
            found = recorded(tensor)
            if found is None:
                become(tensor, plain_memory(tensor))
            elif found.memory is not None and not _has_graph(tensor):
                with suppress(RuntimeError):  # something in C++ holds it: it stays as it is, and has its values
                    self.put(tensor, real_tensor(found, ref_of(tensor._meta, found.storage)))

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Give a recorded tensor the memory of ``value``, or what the strategy of its model makes of that."""
        found = recorded(tensor)
        origin = -1 if found is None else self.waiting.origin(found.storage)
        owners = next((each for each in reversed(self.owners) if each.has(origin)), None)
        become(tensor, value) if owners is None else owners.put(origin, tensor, value)


MSG_JIT_TRACE = (
    "torch.jit.trace has come to a tensor that was recorded and was not in real memory yet. Call "
    "fabric_init.materialize(model), or run the model once, before that."
)
_OF_ALL_RANKS = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})
"""Namespaces of collectives, which are never run again later, when the other ranks are elsewhere."""


_FOREACH: dict[Any, Any] = {
    torch.ops.aten._foreach_copy_.default: torch.ops.aten.copy_.default,
    torch.ops.aten._foreach_zero_.default: torch.ops.aten.zero_.default,
}


def _all_recorded() -> list[Tensor]:
    """Return the recorded tensors of this process, by a search of all its objects, of which there may be a million."""
    kinds: set[type] = set()
    more: list[type] = [RecordedTensor]
    while more:
        kinds.add(kind := more.pop())
        more.extend(kind.__subclasses__())
    everything = gc.get_objects()
    return list(compress(everything, map(kinds.__contains__, map(type, everything))))  # no Python code for each


def _writes_in_place(name: str) -> bool:
    if name.endswith("__"):
        return name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name.endswith("_")


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    storage = None if tensor.layout != torch.strided else tensor.untyped_storage()._cdata
    return storage, tensor.size(), tensor.stride() if storage is not None else None, tensor.storage_offset()


def _has_graph(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is computed with autograd, so that it cannot become another tensor."""
    with torch.no_grad():
        try:
            return tensor.grad_fn is not None
        except RuntimeError:  # a view made under no_grad, of a base that was written since
            return True


def _use_of(func: Any) -> str:
    return f"be used by {func.overloadpacket.__name__}" if hasattr(func, "overloadpacket") else "be used"
