"""The recorder: a dispatch mode that runs the constructor's aten ops on the meta device and writes them to the tape.

Which op is recorded and which runs for real is laid down in [Note: what is recorded], ``recording/__init__.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from typing_extensions import Self

from fabric_init._torch_internals import DisableTorchFunction, TorchDispatchMode
from fabric_init.errors import RecordingError
from fabric_init.recording.in_block.init_calls import init_call
from fabric_init.recording.in_block.meta_kernels import (
    META,
    is_dense,
    like_on_meta,
    map_tensors,
    recorded_results,
    run_on_meta,
    tensors_in,
    written_tensors,
)
from fabric_init.recording.in_block.tape_writer import OnReal, Shards, TapeWriter
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.replay.tracing import not_compiled
from fabric_init.recording.tape.op_properties import asks_shape_only, only_copies, traits
from fabric_init.recording.tape.random_streams import RandomStreams, generator_kept
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.geometry import follow_meta, may_change, resize, same_geometry, view_in_place
from fabric_init.recording.tensor.recorded_storage import RecordedStorage
from fabric_init.recording.tensor.recorded_tensor import ASKS_DEVICE, RecordedTensor, make_recorded_tensor, meta_of
from fabric_init.recording.tensor.storage_tags import StorageTag
from fabric_init.recording.tensor.wrappers import is_recorded_shard, is_sharded, is_sharded_class, is_wrapper_class

_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})

_MSG_MIXED = (
    "{name} in a recorded block: one of its DTensors was recorded, and has no values yet, and another one has. No rank "
    "has the whole of that one. Call it once the model is filled, or distribute both in the block."
)
MSG_SHARDED = (
    "a recorded model was sharded inside its block. Shard it after the block, and fill it then: fully_shard(model), "
    "fabric_init.materialize(model). Blocks of fabric_init.deferred_init() also take models that are sharded in them."
)


class Recorder(TorchDispatchMode, TapeWriter):
    """Dispatch mode that writes one tape.

    Args:
        tape: The tape to write.
        agree: Maps the seed of this process to the one that all ranks use.
        skips_init: Whether the default generator is left where Lightning's ``empty_init=True`` leaves it.
        shards: What knows the DTensors that are made in the block; ``None`` refuses them.
    """

    def __init__(
        self,
        tape: Tape,
        agree: Callable[[int], int] = int,
        *,
        skips_init: bool = False,
        shards: Shards | None = None,
    ) -> None:
        TorchDispatchMode.__init__(self)
        TapeWriter.__init__(self, tape, shards)
        self._agree = agree
        self._skips_init = skips_init
        self._intended_device: torch.device | None = None  # a device that has to be named to torch as meta
        self.recognizes_init_calls = True

    def __repr__(self) -> str:
        return f"<Recorder: {self.tape.summary()}>"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's wrapper that skips dynamo would import all of it; see not_compiled

    def __enter__(self) -> Self:
        with real_execution():
            self.streams = RandomStreams(self.tape, exact=self.exact, agree=self._agree, skips_init=self._skips_init)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._running_init = None
        assert self.streams is not None
        with real_execution():
            self.streams.close()

    @not_compiled
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        wrappers = [kind for kind in types if is_wrapper_class(kind)]
        if not all(map(is_sharded_class, wrappers)):
            return NotImplemented  # its class answers, and what it does to the tensors that it holds comes here
        if func is ASKS_DEVICE:
            return args[0].device
        with DisableTorchFunction():
            if wrappers:
                return self._record_on_wholes(func, args, dict(kwargs) if kwargs else {})
            return self.record_op(func, args, dict(kwargs) if kwargs else {})

    @contextmanager
    def intended_device(self, device: torch.device) -> Iterator[None]:
        """Record memory that is allocated on meta inside this context as meant for ``device``."""
        before, self._intended_device = self._intended_device, device
        try:
            yield
        finally:
            self._intended_device = before

    # -- ops -----------------------------------------------------------------------------------------------------------

    def record_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op_traits = traits(func)
        if op_traits.plain_fill and (target := self.lookup(args[0])) is not None and target.memory is None:
            return self.fill(func, args, kwargs, sys._getframe(2))
        if op_traits.view_in_place and self.lookup(args[0]) is not None:
            return view_in_place(func, args, kwargs)
        if op_traits.view and not self.recognizes_init_calls and (views := self._views(func, args, kwargs)) is not None:
            return views
        tensors = list(tensors_in((args, kwargs.values())))
        recordings = [recording for tensor in tensors if (recording := self.lookup(tensor)) is not None]
        if any(recording.memory is not None for recording in recordings):
            return self._with_memory(func, args, kwargs)
        if op_traits.name == "aten::set_" and len(args) > 1 and (result := self._set_memory(args)) is not None:
            return result
        if not recordings:
            if tensors and not (op_traits.unfilled and kwargs.get("device") is not None):
                return self._untracked(func, args, kwargs, tensors)
            if not op_traits.has_device:
                return func(*args, **kwargs)
        if op_traits.has_device and kwargs.get("device") == META:
            # torch's own code allocates next to a recorded tensor, which it takes to be on meta. Model code that asks
            # for the meta device by name does not get here.
            kwargs["device"] = self._intended_device or (
                recordings[0].device if recordings else torch.get_default_device()
            )
        written = written_tensors(func, args, kwargs)
        if op_traits.name == "aten::_cudnn_rnn_flatten_weight":
            return args[0][0]  # concerns real memory only: done once the weights have some
        if func.namespace in _COLLECTIVES:
            raise RecordingError(
                f"{op_traits.name} in a recorded block: the tensor has no values to send to other ranks yet. Of a "
                "DTensor, full_tensor() and redistribute() do that. Call them once the model is filled. "
                "deepspeed.zero.Init does, too: leave it out, and partition with materialize(model, deepspeed=config)."
            )
        if op_traits.data_dependent:
            return self._with_true_values(func, args, kwargs, recordings)
        if any(self.lookup(tensor) is None for tensor in written):
            self._note_look(None, tuple(tensors), {})
            return func(*self._real(args), **self._real(kwargs))  # writes a real tensor: run it now

        frame = sys._getframe(2)
        init_frame = init_call(frame) if self.recognizes_init_calls and (recordings or op_traits.has_device) else None
        if init_frame is not None:
            self.record_init_frame(init_frame)
        fits, result = self._on_meta(func, args, kwargs, written)
        if not fits:  # if the op itself is wrong, torch raises on true values
            return self._with_true_values(func, args, kwargs, recordings)
        if op_traits.quantizes or not all(is_dense(tensor) for tensor in tensors_in((result,))):
            self._note_look(None, tuple(tensors), {})
            with real_execution():  # the tape only describes strided memory, so a sparse tensor is real at once
                return func(*self._real(args), **self._real(kwargs))
        if init_frame is None or init_frame is not self._running_init:  # else its ops are part of the recorded call
            self._record(func, args, kwargs, recordings, written, result, frame)
        results = recorded_results(result, tensors)
        if op_traits.name == "aten::set_":
            self._followed(args[0])
        return results

    def _on_meta(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[torch.Tensor]
    ) -> tuple[bool, Any]:
        """Return whether meta kernels tell how the results of an op are arranged, and what it returns on them.

        They do not for tensors that an op writes, as ``out=``, and gives another shape.
        """
        twins = [(tensor, tensor._twin) for tensor in written if isinstance(tensor, RecordedTensor)]
        for tensor in written:
            may_change(tensor)
        try:
            result = run_on_meta(func, args, kwargs)
            if traits(func).changes_geometry or all(same_geometry(tensor, meta_of(tensor)) for tensor in written):
                return True, result
        except (NotImplementedError, RuntimeError):
            pass
        for tensor, twin in twins:
            tensor._twin = twin
        return False, None

    def _views(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return views of a recorded tensor, which need no op of their own; ``None`` if ``args`` hold no such one."""
        base = self.lookup(args[0])
        if base is None or base.memory is not None:
            return None
        result = func(meta_of(args[0]), *args[1:], **kwargs)
        device = base.device
        return map_tensors(result, lambda meta: make_recorded_tensor(meta, device))

    def fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType) -> torch.Tensor:
        """Record an in-place fill without running its meta kernel: it changes no shape, and most init ends in one."""
        target: torch.Tensor = args[0]
        init_frame = init_call(frame) if self.recognizes_init_calls else None
        if init_frame is not None:
            self.record_init_frame(init_frame)
        if init_frame is None or init_frame is not self._running_init:
            ref = self.ref(target)
            self.add(func, (ref, *args[1:]), kwargs, (ref,), (), frame)
        return target

    def _record_on_wholes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an op on DTensors as one on the whole tensors that they are parts of."""
        sharded = [tensor for tensor in tensors_in((args, kwargs.values())) if is_sharded(tensor)]
        are_recorded = [is_recorded_shard(tensor) for tensor in sharded]
        if not any(are_recorded):
            return func(*args, **kwargs)  # their class answers: a kernel would look for memory that only parts have
        shards = self.shards
        if shards is None:
            raise RecordingError(MSG_SHARDED)
        if not all(are_recorded):
            raise RecordingError(_MSG_MIXED.format(name=traits(func).name))
        if traits(func).name in ("aten::detach", "aten::alias"):
            return shards.alias(args[0])
        wholes = {id(tensor): self.whole(tensor) for tensor in sharded}
        passed = {id(wholes[id(tensor)]): tensor for tensor in sharded}
        on_wholes = map_tensors((args, kwargs), lambda tensor: wholes.get(id(tensor), tensor))
        result = self.record_op(func, *on_wholes)
        new = only_copies(func) or asks_shape_only(func) or traits(func).pointwise or traits(func).unfilled

        def shared_out(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in passed:
                return passed[id(tensor)]
            like = next((each for each in sharded if each.size() == tensor.size()), None)
            if like is None or not new or self.lookup(tensor) is None:
                return tensor
            return shards.like(self, like, tensor)

        return map_tensors(result, shared_out)

    # -- running an op: on true values, on real tensors ----------------------------------------------------------------

    def _with_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an op on tensors of an earlier block that have their values: on real ones, from here on."""
        given: dict[int, torch.Tensor] = {}

        def real(tensor: torch.Tensor) -> torch.Tensor:
            recording = self.lookup(tensor)
            if recording is None or recording.memory is None:
                return tensor
            value: torch.Tensor = self.tape.after_block.value(tensor, "be read")
            given[id(value)] = tensor
            return value

        real_args, real_kwargs = map_tensors((args, kwargs), real)
        result = self.record_op(func, real_args, real_kwargs)
        return map_tensors(result, lambda tensor: given.get(id(tensor), tensor))

    def _with_true_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recordings: list[StorageTag]
    ) -> Any:
        """Run ``func`` on the values that its arguments would have by now; tensors that come out are recorded."""
        with real_execution(), generator_kept(func, kwargs):  # a recorded draw is made by replay, not here
            real_args, real_kwargs = self._real((args, kwargs))
            real = func(*real_args, **real_kwargs)
            written = written_tensors(func, args, kwargs)
            for tensor, value in zip(written, written_tensors(func, real_args, real_kwargs), strict=True):
                if isinstance(tensor, RecordedTensor) and not same_geometry(tensor, value):
                    resize(tensor, value)
            described = all(is_dense(tensor) for tensor in tensors_in((real,)))
            if not written:
                self._note_look(func if described else None, args, kwargs)
            if not any(True for _ in tensors_in((real,))) or not described:
                return real
            result = map_tensors(real, like_on_meta)
        self._record(func, args, kwargs, recordings, written, result, sys._getframe(2))
        return recorded_results(result, ())

    def _set_memory(self, args: tuple[Any, ...]) -> Any:
        """Run ``t.set_(…)`` with a storage, which is how ``torch.load`` builds tensors, or with a real tensor.

        Returns ``None`` for one recorded tensor that is set to another, and for a real one.
        """
        is_storage = isinstance(args[1], torch.UntypedStorage)
        if not isinstance(args[0], RecordedTensor):
            if isinstance(args[1], (RecordedTensor, RecordedStorage)):
                raise RecordingError(
                    "a real tensor is set on the memory of a recorded one (set_), which has none yet. Make that tensor "
                    "in the block, too, or take a view of the other one."
                )
            return None
        if not is_storage and self.lookup(args[1]) is not None:
            return None
        may_change(args[0])
        if is_storage and (args[1].device.type == "meta" or isinstance(args[1], RecordedStorage)):
            meta_of(args[0]).set_(*args[1:])
            return self._followed(args[0])
        with real_execution():
            real = torch.empty(0, dtype=args[0].dtype, device=args[1].device).set_(*args[1:])
            constant = real.detach()
        tensor = self.constant(constant)
        self._on_real[self.ref(tensor).storage] = OnReal(tensor, real, constant)
        torch.ops.aten.set_.source_Tensor(meta_of(args[0]), meta_of(tensor))
        return self._followed(args[0])

    def _followed(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, RecordedTensor):
            follow_meta(tensor)
        return tensor

    def _untracked(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if not traits(func).random or any(tensor.is_meta for tensor in tensors) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        # Random numbers for real memory have to be those of this position in the stream: record the op on stand-ins,
        # then copy their true values.
        stand_ins = {id(tensor): self.constant(tensor.detach().clone()) for tensor in tensors}
        swapped_args, swapped_kwargs = map_tensors((args, kwargs), lambda tensor: stand_ins[id(tensor)])
        result = self.record_op(func, swapped_args, swapped_kwargs)
        originals = {id(stand_ins[id(tensor)]): tensor for tensor in tensors}
        for tensor in written_tensors(func, args, kwargs):
            with real_execution():
                tensor.copy_(self.true_value(stand_ins[id(tensor)]))

        def real(tensor: torch.Tensor) -> torch.Tensor:
            original = originals.get(id(tensor))
            return self.true_value(tensor) if original is None else original

        return map_tensors(result, real)
