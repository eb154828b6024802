"""What the recorder writes to the tape: ops and looks, with references and constants in the place of tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from fabric_init._torch_internals import DisableTorchDispatch, OpOverload
from fabric_init.errors import RecordingError
from fabric_init.recording.in_block.meta_kernels import dense, like_on_meta, map_tensors, tensors_in
from fabric_init.recording.replay.replay import real_execution, storage_now, view
from fabric_init.recording.tape.call_site import caller
from fabric_init.recording.tape.op_properties import (
    DRAWS_FROM_DEFAULT,
    INIT_FUNCTIONS,
    Func,
    has_out,
    is_random,
    traits,
)
from fabric_init.recording.tape.random_streams import RandomStreams
from fabric_init.recording.tape.tape import Op, Tape, TensorRef, now
from fabric_init.recording.tensor.recorded_tensor import make_recorded_tensor, meta_of, recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag, begin, recorded_storage, ref_of
from fabric_init.recording.tensor.wrappers import is_recorded_shard

_CPU = torch.device("cpu")


class Shards(Protocol):
    """Knows the whole tensor behind each DTensor that is made in a block. See [Note: sharding in the block]."""

    def whole(self, writer: TapeWriter, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole recorded tensor that the DTensor ``tensor`` is a part of, to be read and written."""
        ...

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return another DTensor on the same memory."""
        ...

    def like(self, writer: TapeWriter, tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Return a new DTensor that is sharded as ``tensor`` is, a part of the recorded ``whole``."""
        ...

    def refresh(self, tape: Tape, storage: int) -> None:
        """Let a shard on ``storage``, which is about to be used by itself, have what its whole tensor holds by now."""
        ...


class OnReal(NamedTuple):
    """A recorded tensor that was set on real memory: that, and the same as the constant that the tape starts from."""

    tensor: torch.Tensor
    real: torch.Tensor
    constant: torch.Tensor


class TapeWriter:
    """Writes one tape.

    Args:
        tape: The tape to write.
        shards: What knows the DTensors that are made in the block; ``None`` refuses them.
    """

    def __init__(self, tape: Tape, shards: Shards | None = None) -> None:
        self.tape = tape
        self.shards = shards
        self.exact = tape.rng == "eager"
        self.streams: RandomStreams | None = None
        self.own_init_counts = False  # load code runs: what waits for a load has the values of its own init until then
        self._on_real: dict[int, OnReal] = {}  # by number of the storage
        self._running_init: FrameType | None = None  # the init function that is recorded already, while its ops come in

    # -- ops and looks -------------------------------------------------------------------------------------------------

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        recordings: list[StorageTag],
        written: list[torch.Tensor],
        result: Any,
        frame: FrameType | None,
    ) -> None:
        op_traits = traits(func)
        if op_traits.changes_geometry and op_traits.name != "aten::resize_":
            for tensor in written:
                if recorded_storage(meta := meta_of(tensor)) is None:  # t.set_() has left the memory that it was on
                    self.new_storage(meta, recordings[0].device)
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
        if op_traits.changes_geometry or has_out(func):
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
        draws = None
        if is_random(func):
            assert self.streams is not None
            draws = self.streams.of(kwargs.pop("generator", None))
        draw = None if draws is None else draws.draw()
        op = Op(now(), func, args, kwargs, targets, outputs, draw, caller(frame), default_dtype)
        self.tape.append(op)
        if draws is not None:
            draws.drawn(op.number, by_init=not isinstance(func, OpOverload))
        if self._on_real:
            self._write_real({ref.storage for ref in targets})

    def _write_real(self, storages: Iterable[int]) -> None:
        """Let the real memory that recorded tensors were set on have what an op has just written to ``storages``."""
        for storage in self._on_real.keys() & storages:
            tensor, real, constant = self._on_real[storage]
            with real_execution():
                value = self.true_value(tensor)
                torch.ops.aten.set_.source_Tensor(
                    constant, constant.clone()
                )  # what was recorded of that memory before stays as it was
                real.copy_(value)

    def add_init(self, func: Func, tensor: torch.Tensor, options: dict[str, Any], frame: FrameType | None) -> None:
        """Write a whole ``torch.nn.init`` call to the tape."""
        ref = self.ref(tensor)
        for name, value in options.items():
            if isinstance(value, torch.Tensor):  # plain PyTorch reads its value now
                options[name] = self._real(value).item()
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

    def _note_look(self, func: Func | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.own_init_counts:
            return
        if func is None or is_random(func):
            func, args, kwargs = None, tuple(t for t in tensors_in((args, kwargs.values())) if self.lookup(t)), {}
        self.tape.add_look(func, self._refs(args), self._refs(kwargs), caller(sys._getframe(2)))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def lookup(self, tensor: torch.Tensor) -> StorageTag | None:
        """Return the recording of ``tensor``; join the tape of an earlier block to this one first."""
        recording = recorded(tensor)
        if recording is not None and recording.first_tape is not self.tape:
            tape = recording.tape
            if tape is not self.tape:
                tape.join(self.tape)
        if recording is not None and self.shards is not None:
            self.shards.refresh(self.tape, recording.storage)
        return recording

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor behind a DTensor that was recorded; any other tensor as it is."""
        return self.shards.whole(self, tensor) if self.shards is not None and is_recorded_shard(tensor) else tensor

    def ref(self, tensor: torch.Tensor) -> TensorRef:
        recording = self.lookup(tensor)
        assert recording is not None
        return recorded_ref(tensor, recording.storage)

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new recorded tensor with the value of the real ``tensor``."""
        with DisableTorchDispatch():
            meta = dense(like_on_meta(tensor))
        ref = self.new_storage(meta, tensor.device)
        value = self.tape.add_constant(tensor)
        op = Op(now(), torch.ops.aten.clone.default, (value,), {}, (), (ref,), source=caller(sys._getframe(1)))
        self.tape.append(op)
        return make_recorded_tensor(meta, tensor.device)

    def new_storage(self, tensor: torch.Tensor, device: torch.device) -> TensorRef:
        """Start recording the storage of ``tensor``, meant for ``device``; return the reference to it."""
        return ref_of(tensor, begin(tensor, self.tape, device))

    def constant_value(self, value: torch.Tensor) -> torch.Tensor:
        """Return what the tape keeps of a real tensor that an op reads: its value at this moment."""
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

    # -- values --------------------------------------------------------------------------------------------------------

    def look_at(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the true value of ``tensor`` for Python to see, and note that on the tape."""
        value = self.true_value(tensor)
        self._note_look(None, (tensor,), {})
        return value

    def true_value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the values of ``tensor`` at this point as a real tensor. Only that tensor is replayed."""
        recording = self.lookup(tensor)
        assert recording is not None
        waits = not self.own_init_counts and self.tape.after_block.waiting.missing(
            [recording.storage], declared_count=False
        )
        if recording.memory is not None or waits:
            value: torch.Tensor = self.tape.after_block.value(tensor, "be read")  # of an earlier block: it may wait
            return value
        memory, random = storage_now(self.tape, recording.storage, exact=self.exact)
        if random:
            self.tape.sealed_rng = self.tape.rng
        with real_execution():
            return view(memory, self.ref(tensor))

    def _real(self, value: Any) -> Any:
        return map_tensors(value, lambda tensor: tensor if recorded(tensor) is None else self.true_value(tensor))
