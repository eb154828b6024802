"""The recorder: a dispatch mode that runs the constructor's aten ops on the meta device and writes them to the tape.

Which op is recorded and which runs for real is laid down in [Note: what is recorded], ``recording/__init__.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from typing_extensions import Self

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, OpOverload, TorchDispatchMode
from fabric_init.errors import RecordingError
from fabric_init.recording.call_site import caller, init_call
from fabric_init.recording.meta_kernels import (
    META,
    dense,
    is_dense,
    like_on_meta,
    map_tensors,
    plain_shape,
    pointwise_result,
    tensors_in,
    written_tensors,
)
from fabric_init.recording.op_schemas import (
    DRAWS_FROM_DEFAULT,
    INIT_FUNCTIONS,
    Func,
    asks_shape_only,
    is_random,
    only_copies,
    traits,
)
from fabric_init.recording.replay import real_execution, storage_now, view
from fabric_init.recording.rng import Streams
from fabric_init.recording.storage import RecordedStorage
from fabric_init.recording.storage_tags import Recorded, begin, ref_of
from fabric_init.recording.tape import Draw, Tape, TensorRef
from fabric_init.recording.tensor import ASKS_DEVICE, RecordedTensor, follow_meta, meta_of, recorded, recorded_tensor
from fabric_init.recording.wrappers import is_sharded, is_sharded_class, is_wrapper_class

_CPU = torch.device("cpu")
_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})

MSG_SHARDED = (
    "a recorded model was sharded inside its block. Shard it after the block, and fill it then: fully_shard(model), "
    "fabric_init.materialize(model). Blocks of fabric_init.deferred_init() also take models that are sharded in them."
)


class Shards(Protocol):
    """Knows the whole tensor behind each DTensor that is made in a block. See [Note: sharding in the block]."""

    def whole(self, recorder: Recorder, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole recorded tensor that the DTensor ``tensor`` is a part of, to be read and written."""
        ...

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return another DTensor on the same memory."""
        ...

    def like(self, recorder: Recorder, tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return a new DTensor that is sharded as ``tensor`` is, a part of the recorded ``whole``."""
        ...

    def refresh(self, tape: Tape, storage: int) -> None:
        """Let a shard on ``storage``, which is about to be used by itself, have what its whole tensor holds by now."""
        ...


class _OnReal(NamedTuple):
    """A recorded tensor that was set on real memory: that, and the same as the constant that the tape starts from."""

    tensor: torch.Tensor
    real: torch.Tensor
    constant: torch.Tensor


class Recorder(TorchDispatchMode):
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
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape
        self.shards = shards
        self.exact = tape.rng == "eager"
        self._agree = agree
        self._skips_init = skips_init
        self.streams: Streams | None = None
        self._intended_device: torch.device | None = None  # a device that has to be named to torch as meta
        self.recognizes_init_calls = True
        self.own_init_counts = False  # load code runs: what waits for a load has the values of its own init until then
        self._running_init: FrameType | None = None  # the init function that is recorded already, while its ops come in
        self._on_real: dict[int, _OnReal] = {}  # by number of the storage

    def __repr__(self) -> str:
        return f"<Recorder: {self.tape.summary()}>"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # constructors are not compiled, and torch's wrapper that skips dynamo would import all of it

    def __enter__(self) -> Self:
        with real_execution():
            self.streams = Streams(self.tape, exact=self.exact, agree=self._agree, skips_init=self._skips_init)
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

    # -- ops ---------------------------------------------------------------------------------------------------------

    def record_op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op_traits = traits(func)
        if op_traits.plain_fill and (target := self.lookup(args[0])) is not None and target.memory is None:
            return self._fill(func, args, kwargs)
        if op_traits.view and not self.recognizes_init_calls and (views := self._views(func, args, kwargs)) is not None:
            return views
        tensors = list(tensors_in((args, kwargs.values())))
        recordings = [recording for tensor in tensors if (recording := self.lookup(tensor)) is not None]
        if any(recording.memory is not None for recording in recordings):
            return self._with_memory(func, args, kwargs)
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
        if op_traits.name == "aten::set_" and len(args) > 1 and isinstance(args[1], torch.UntypedStorage):
            return self._set_storage(args)
        written = written_tensors(func, args, kwargs)
        if op_traits.name == "aten::_cudnn_rnn_flatten_weight":
            return args[0][0]  # concerns real memory only: done once the weights have some
        if func.namespace in _COLLECTIVES:
            raise RecordingError(
                f"{op_traits.name} in a recorded block: the tensor has no values to send to other ranks yet. Of a "
                "DTensor, full_tensor() and redistribute() do that. Call them once the model is filled."
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
        try:
            result = self._on_meta(func, args, kwargs)
        except (NotImplementedError, RuntimeError):  # if the op itself is wrong, torch raises again on true values
            return self._with_true_values(func, args, kwargs, recordings)
        if not all(is_dense(tensor) for tensor in tensors_in((result,))):
            self._note_look(None, tuple(tensors), {})
            with real_execution():  # the tape only describes strided memory, so a sparse tensor is real at once
                return func(*self._real(args), **self._real(kwargs))
        if init_frame is None or init_frame is not self._running_init:  # else its ops are part of the recorded call
            self._record(func, args, kwargs, recordings, written, result, frame)
        return self._wrapped(result, tensors, recordings, kwargs)

    def _views(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return views of a recorded tensor, which need no op of their own; ``None`` if ``args`` hold no such one."""
        base = self.lookup(args[0])
        if base is None or base.memory is not None:
            return None
        result = func(meta_of(args[0]), *args[1:], **kwargs)
        device = base.device
        return map_tensors(result, lambda meta: recorded_tensor(meta, device))

    def _fill(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Record an in-place fill without running its meta kernel: it changes no shape, and most init ends in one."""
        frame = sys._getframe(3)
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
        if not any(is_recorded_shard(tensor) for tensor in sharded):
            with real_execution():
                return func(*args, **kwargs)
        shards = self.shards
        if shards is None:
            raise RecordingError(MSG_SHARDED)
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

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor behind a DTensor that was recorded; any other tensor as it is."""
        return self.shards.whole(self, tensor) if self.shards and is_recorded_shard(tensor) else tensor

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recordings: list[Recorded],
        written: list[torch.Tensor],
        result: Any,
        frame: FrameType | None,
    ) -> None:
        op_traits = traits(func)
        if op_traits.changes_geometry and op_traits.name != "aten::resize_":
            return
        if op_traits.unfilled and not recordings:  # module.to_empty(device), for a module on meta
            for tensor in tensors_in((result,)):
                begin(tensor, self.tape, torch.device(kwargs.get("device") or _CPU))
            return
        inputs = self._refs(args), self._refs(kwargs)  # before the outputs have numbers: an op does not read its result
        device = kwargs.get("device") or (recordings[0].device if recordings else _CPU)
        outputs = tuple(
            self.new_storage(tensor, torch.device(device))
            for tensor in tensors_in((result,))
            if self.lookup(tensor) is None
        )
        if op_traits.unfilled or not (outputs or written):
            return
        default_dtype = None
        if outputs and outputs[0].dtype.is_floating_point and kwargs.get("dtype") is None:
            if op_traits.takes_dtype and not recordings:
                inputs[1]["dtype"] = outputs[0].dtype  # torch's default dtype may differ at replay
            elif not any(t.is_floating_point() or t.is_complex() for t in tensors_in((args, kwargs.values()))):
                default_dtype = torch.get_default_dtype()
        targets = tuple(self.ref(tensor) for tensor in written)
        if op_traits.name == "aten::resize_":
            for tensor in written:
                self._grow(tensor)
        self.add(func, *inputs, targets, outputs, frame, default_dtype)

    def add(
        self,
        func: Func,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: tuple[TensorRef, ...],
        outputs: tuple[TensorRef, ...],
        frame: FrameType | None,
        default_dtype: torch.dtype | None = None,
    ) -> None:
        """Write one op to the tape, with its position in the random streams. torch's modes must be off."""
        if is_random(func):
            assert self.streams is not None
            generator = kwargs.pop("generator", None)
            streams = self.streams.of(generator)
            draw: Draw = streams.draw()
            number = self.tape.add_op(func, args, kwargs, targets, outputs, draw, caller(frame), default_dtype)
            streams.drawn(number, by_init=not isinstance(func, OpOverload))
        else:
            self.tape.add_op(func, args, kwargs, targets, outputs, None, caller(frame), default_dtype)
        if self._on_real:
            self._write_real({ref.storage for ref in targets})

    def _write_real(self, storages: Iterable[int]) -> None:
        """Let the real memory that recorded tensors were set on have what an op has just written to ``storages``."""
        for storage in self._on_real.keys() & storages:
            tensor, real, constant = self._on_real[storage]
            with real_execution():
                value = self.true_value(tensor)
                constant.set_(constant.clone())  # what was recorded of that memory before stays as it was
                real.copy_(value)

    def add_init(self, func: Func, tensor: torch.Tensor, options: dict[str, Any], frame: FrameType | None) -> None:
        """Write a whole ``torch.nn.init`` call to the tape."""
        ref = self.ref(tensor)
        if any(isinstance(value, torch.Tensor) for value in options.values()):  # plain PyTorch reads their values now
            options = {name: self._real(v).item() if isinstance(v, torch.Tensor) else v for name, v in options.items()}
        self.add(func, (ref,), options, (ref,), (), frame)

    def record_init_frame(self, frame: FrameType) -> None:
        """Record the running init function of ``frame`` as one op, with its arguments, unless that was done already."""
        if frame is self._running_init:
            return
        self._running_init = None
        values = dict(frame.f_locals)
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        tensor = self.whole(values[names[0]])
        if code.co_name in DRAWS_FROM_DEFAULT and values.get("generator") is not None:
            return  # draws from two generators: its ops are recorded one by one
        if isinstance(tensor, torch.Tensor) and self.lookup(tensor) is not None:
            self.add_init(INIT_FUNCTIONS[code.co_name], tensor, {name: values[name] for name in names[1:]}, frame)
            self._running_init = frame

    # -- tensors -----------------------------------------------------------------------------------------------------

    def lookup(self, tensor: torch.Tensor) -> Recorded | None:
        """Return the recording of ``tensor``; join the tape of an earlier block to this one first."""
        recording = recorded(tensor)
        if recording is not None and recording.first_tape is not self.tape:
            tape = recording.tape
            if tape is not self.tape:
                tape.join(self.tape)
        if recording is not None and self.shards is not None:
            self.shards.refresh(self.tape, recording.storage)
        return recording

    def ref(self, tensor: torch.Tensor) -> TensorRef:
        recording = self.lookup(tensor)
        assert recording is not None
        return ref_of(meta_of(tensor), recording.storage)

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new recorded tensor with the value of the real ``tensor``."""
        with DisableTorchDispatch():
            meta = dense(like_on_meta(tensor))
        ref = self.new_storage(meta, tensor.device)
        value = self.tape.add_constant(tensor)
        self.tape.add_op(torch.ops.aten.clone.default, (value,), {}, (), (ref,), None, caller(sys._getframe(1)))
        return recorded_tensor(meta, tensor.device)

    def new_storage(self, tensor: torch.Tensor, device: torch.device) -> TensorRef:
        """Start recording the storage of ``tensor``, meant for ``device``; return the reference to it."""
        return ref_of(tensor, begin(tensor, self.tape, device))

    def constant_value(self, value: torch.Tensor) -> torch.Tensor:
        """What the tape holds of a real tensor that an op reads: its value at this moment."""
        return value.detach().clone()

    def _grow(self, tensor: torch.Tensor) -> None:
        recording = self.lookup(tensor)
        assert recording is not None
        info = self.tape.storages[recording.storage]
        self.tape.storages[recording.storage] = info._replace(nbytes=meta_of(tensor).untyped_storage().nbytes())

    def _refs(self, value: Any) -> Any:
        """Return ``value`` with tensors replaced by references and constants.

        Raises:
            RecordingError: A tensor is on meta and not recorded, so it has no values.
        """
        if isinstance(value, torch.Tensor):
            if self.lookup(value) is not None:
                return self.ref(value)
            if value.is_meta:
                raise RecordingError(
                    f"A recorded op reads a meta tensor of shape {tuple(value.shape)} that has no values, because it "
                    "was created outside this block. Create it inside the block, or on a real device."
                )
            with DisableTorchDispatch():
                return self.tape.add_constant(self.constant_value(value))
        if type(value) is dict:
            return {name: self._refs(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self._refs(item) for item in value])
        return value

    # -- running an op: on meta, on true values, on real tensors -----------------------------------------------------

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def meta(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                value = meta_of(value)
                return value if value.is_meta or value.dim() == 0 else like_on_meta(value)
            if type(value) in (list, tuple):
                return type(value)([meta(item) for item in value])
            return value

        if (shape := plain_shape(func, args)) is not None and kwargs.get("layout") in (None, torch.strided):
            integers = traits(func).name == "aten::arange"
            return torch.empty(shape, dtype=kwargs.get("dtype") or (torch.int64 if integers else None), device=META)
        if traits(func).pointwise and (result := pointwise_result(func, args, kwargs)) is not None:
            return result
        kwargs = {name: meta(value) for name, value in kwargs.items() if name not in ("pin_memory", "generator")}
        if traits(func).has_device:
            kwargs["device"] = META
        if traits(func).takes_generator:
            kwargs["generator"] = None
        result = func(*(meta(value) for value in args), **kwargs)
        return map_tensors(result, lambda tensor: dense(tensor) if recorded(tensor) is None else tensor)

    def _with_memory(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op on tensors of an earlier block that have their values: on real ones, from here on."""
        given: dict[int, torch.Tensor] = {}

        def real(tensor: torch.Tensor) -> torch.Tensor:
            recording = self.lookup(tensor)
            if recording is None or recording.memory is None:
                return tensor
            value: torch.Tensor = self.tape.later.value(tensor, "be read")
            given[id(value)] = tensor
            return value

        real_args, real_kwargs = map_tensors((args, kwargs), real)
        result = self.record_op(func, real_args, real_kwargs)
        return map_tensors(result, lambda tensor: given.get(id(tensor), tensor))

    def _with_true_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], recordings: list[Recorded]
    ) -> Any:
        """Run ``func`` on the values that its arguments would have by now; tensors that come out are recorded."""
        with real_execution(), _generator_kept(func, kwargs):  # a recorded draw is made by replay, not here
            real = func(*self._real(args), **self._real(kwargs))
            if not written_tensors(func, args, kwargs):
                self._note_look(func, args, kwargs)
            if not any(True for _ in tensors_in((real,))) or not all(is_dense(t) for t in tensors_in((real,))):
                return real
            result = map_tensors(real, like_on_meta)
        self._record(func, args, kwargs, recordings, written_tensors(func, args, kwargs), result, sys._getframe(2))
        return self._wrapped(result, (), recordings, kwargs)

    def _wrapped(self, result: Any, tensors: Iterable[torch.Tensor], recordings: list[Recorded], kwargs: Any) -> Any:
        """What an op on meta tensors has returned, as recorded tensors: those that were passed in stay themselves."""
        passed = {id(meta_of(tensor)): tensor for tensor in tensors}

        def wrapped(meta: torch.Tensor) -> torch.Tensor:
            tensor = passed.get(id(meta))
            if tensor is None:
                recording = recorded(meta)
                return meta if recording is None else recorded_tensor(meta, recording.device)
            if isinstance(tensor, RecordedTensor) and (
                meta.size() != tensor.size() or meta.stride() != tensor.stride()
            ):
                follow_meta(tensor)
            return tensor

        return map_tensors(result, wrapped)

    def _set_storage(self, args: tuple[Any, ...]) -> Any:
        """Run ``t.set_(storage, …)``, which is how ``torch.load`` builds tensors, and storages copy their bytes."""
        if args[1].device.type == "meta" or isinstance(args[1], RecordedStorage):
            torch.ops.aten.set_.source_Storage_storage_offset(meta_of(args[0]), *args[1:])
            return self._followed(args[0])
        with real_execution():
            real = torch.empty(0, dtype=args[0].dtype, device=args[1].device).set_(*args[1:])
            constant = real.detach()
        tensor = self.constant(constant)
        self._on_real[self.ref(tensor).storage] = _OnReal(tensor, real, constant)
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

    def _real(self, value: Any) -> Any:
        return map_tensors(value, lambda tensor: tensor if recorded(tensor) is None else self.true_value(tensor))

    def look_at(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the true value of ``tensor`` for Python to see, and note that on the tape."""
        value = self.true_value(tensor)
        self._note_look(None, (tensor,), {})
        return value

    def _note_look(self, func: Func | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.own_init_counts:
            return
        if func is None or is_random(func):
            func, args, kwargs = None, tuple(t for t in tensors_in((args, kwargs.values())) if self.lookup(t)), {}
        self.tape.add_look(func, self._refs(args), self._refs(kwargs), caller(sys._getframe(2)))

    def true_value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the constructor would find in ``tensor`` at this point, as a real tensor. Replays that tensor alone."""
        recording = self.lookup(tensor)
        assert recording is not None
        waits = not self.own_init_counts and self.tape.later.waiting.missing([recording.storage], declared_count=False)
        if recording.memory is not None or waits:
            value: torch.Tensor = self.tape.later.value(tensor, "be read")  # of an earlier block: it may wait
            return value
        memory, random = storage_now(self.tape, recording.storage, exact=self.exact)
        if random:
            self.tape.sealed_rng = self.tape.rng
        with real_execution():
            return view(memory, self.ref(tensor))


def is_recorded_shard(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor whose shard is recorded. Asking for the class would import DTensors."""
    return isinstance(getattr(tensor, "_local_tensor", None), RecordedTensor)


@contextmanager
def _generator_kept(func: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    if not traits(func).random:
        yield
        return
    generator = kwargs.get("generator") or torch.default_generator
    before = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(before)
