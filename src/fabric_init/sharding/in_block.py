"""DTensors in a block that is open: ops on them are recorded as ops on the whole tensors that they are parts of.

[Note: sharding in the block]
A model may be sharded in its block, and initialized there afterwards, as torchtitan does. One seed gives one model,
whatever the mesh, so what the init draws for a DTensor is what it would draw for the whole tensor. Hence each DTensor
has a *whole* tensor of its own beside it, which is recorded as any other: an operator on the DTensor is recorded as one
on the whole (``Recorder._record_on_wholes``), views of it are views of the whole, and a new DTensor that comes out is a
part of a new whole. Its shard is copied from the whole again when it is used by itself, and when the block ends. From
then on it is what a shard is that was made after the block, see [Note: sharding recorded tensors].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._dtensor_internals import TensorMeta
from fabric_init._torch_internals import DisableTorchDispatch
from fabric_init.checkpoints.region import Box
from fabric_init.errors import RecordingError
from fabric_init.planning.tensors import Walk, Walked, walked
from fabric_init.recording.in_block.tape_writer import TapeWriter
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.tape.tape import Op, Tape, TensorRef, now
from fabric_init.recording.tensor.recorded_tensor import make_recorded_tensor, meta_of, recorded
from fabric_init.recording.tensor.storage_tags import begin, ref_of
from fabric_init.recording.tensor.wrappers import is_recorded_shard
from fabric_init.sharding.dtensor import region_of
from fabric_init.sharding.module_tables import plain_tensor, swapped_in, table_entries
from fabric_init.sharding.recorded_copies import nearest_whole
from fabric_init.sharding.whole import recorded_at

_MSG_CHANGED = (
    "the local tensor of a DTensor of shape {shape} was written in a recorded block, by itself. Write to the DTensor: "
    "torch.nn.init functions take it, and give each rank its part of one model."
)
_MSG_UNKNOWN = (
    "a DTensor of shape {shape} was made in a recorded block from a local tensor that is no part of one recorded "
    "tensor of that shape. Distribute a whole tensor, with fully_shard, parallelize_module or distribute_tensor."
)


class _Whole:
    """The whole tensor of a shard.

    Attributes:
        tensor: It, recorded, with nobody else writing to its storage.
        part: The part of it that the shard holds; ``None`` if that is without elements.
        shard: The shard.
        last_write: The number of the last op that has written to ``tensor`` before it was copied to the shard.
        last_copy: The number of the op that has done that.
    """

    def __init__(self, tensor: Tensor, part: TensorRef | None, shard: TensorRef, tape: Tape) -> None:
        self.tensor, self.part, self.shard = tensor, part, shard
        self.last_write = 0 if part is None else _last_writer(tape, part.storage)
        self.last_copy = _last_writer(tape, shard.storage)

    def copy(self, tape: Tape) -> None:
        """Record that the shard is what the whole tensor holds there by now."""
        if self.part is not None and self.part.storage != self.shard.storage:
            self.last_copy = _record_copy(tape, self.part, self.shard)
            self.last_write = _last_writer(tape, self.part.storage)


class ShardsInBlock:
    """The DTensors of one block, by the recorded storages of their shards."""

    def __init__(self) -> None:
        self._wholes: dict[int, _Whole] = {}

    def whole(self, writer: TapeWriter, tensor: Tensor) -> Tensor:
        """Return the whole tensor of a DTensor, which the ops of the block write and read.

        Raises:
            RecordingError: The shard was written by itself, or is no part of one tensor.
        """
        assert isinstance(tensor, DTensor)
        found = recorded(tensor._local_tensor)
        assert found is not None
        known = self._wholes.get(found.storage)
        if known is None:
            ref, part = _origin(tensor, writer)
            known = self._note(writer.tape, _copied(writer.tape, ref, found.device, tensor.dtype), part, tensor)
        elif _last_writer(writer.tape, found.storage) != known.last_copy:
            raise RecordingError(_MSG_CHANGED.format(shape=tuple(tensor.shape)))
        return known.tensor

    def alias(self, tensor: Tensor) -> Tensor:
        """Return another DTensor on the same shard."""
        assert isinstance(tensor, DTensor)
        local: Any = tensor._local_tensor
        with DisableTorchDispatch():
            return DTensor(
                make_recorded_tensor(local._meta.detach(), local._claimed), tensor._spec, requires_grad=False
            )

    def like(self, writer: TapeWriter, tensor: Tensor, whole: Tensor) -> Tensor:
        """Return a new DTensor that is sharded as ``tensor`` is, a part of the recorded ``whole``."""
        assert isinstance(tensor, DTensor)
        found = writer.lookup(whole)
        assert found is not None
        tape = writer.tape
        with real_execution():
            part = region_of(tensor)
            local = torch.empty(part.sizes, dtype=whole.dtype, device="meta")
            begin(local, tape, found.device)
            meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
            shard = make_recorded_tensor(local, found.device)
            made = DTensor(shard, tensor._spec.shallow_copy_with_tensor_meta(meta), requires_grad=False)
        self._note(tape, whole, part, made).copy(tape)
        return made

    def refresh(self, tape: Tape, storage: int) -> None:
        """Let the shard on ``storage``, which is about to be used by itself, have what its whole tensor holds."""
        known = self._wholes.get(storage)
        if known is None or known.part is None or _last_writer(tape, storage) != known.last_copy:
            return
        if _last_writer(tape, known.part.storage) != known.last_write:
            known.copy(tape)

    def _note(self, tape: Tape, whole: Tensor, part: Box, tensor: DTensor) -> _Whole:
        shard, its = recorded(tensor._local_tensor), recorded(whole)
        assert shard is not None
        assert its is not None
        shard_ref = ref_of(meta_of(tensor._local_tensor), shard.storage)
        its_part = None if 0 in part.sizes else _part_of(ref_of(meta_of(whole), its.storage), part)
        known = self._wholes[shard.storage] = _Whole(whole, its_part, shard_ref, tape)
        return known

    # -- the end of the block ------------------------------------------------------------------------------------------

    @contextmanager
    def handed_over(self, models: Iterable[Walk], earlier: Iterable[nn.Module]) -> Iterator[list[Walked]]:
        """Context at the end of the block in which models hold the whole tensors of their recorded DTensors.

        What begins to wait for values there are these. Then the shards are copied from them.

        Args:
            models: The models that the block has built.
            earlier: Models of earlier blocks, of which it has written to some.

        Yields:
            All of ``models``, and those of ``earlier`` that were sharded when the block has written to them.

        Raises:
            RecordingError: A shard was written by itself, or is no part of one tensor.
        """
        held: list[Walked] = list(models)
        there = [place for model in models for place in table_entries(model, is_recorded_shard)]
        for model in earlier:
            its = table_entries(model, is_recorded_shard)
            if any(self._has(place.tensor) for place in its):
                held.append(model)
                there += its
        wholes: dict[int, tuple[Tensor, TensorRef | None, DTensor]] = {}
        error: RecordingError | None = None
        for tensor in {id(place.tensor): place.tensor for place in there}.values():
            try:
                wholes[id(tensor)] = *self._final(tensor), tensor
            except RecordingError as failed:
                error = error or failed
        instead = [(place, {place.key: wholes[id(place.tensor)][0]}) for place in there if id(place.tensor) in wholes]
        try:
            with swapped_in(instead, lambda changed: None):
                yield [Walk(walked(model).model) for model in held] if instead else held
            if error is not None:
                raise error
        finally:
            for _, part, tensor in wholes.values():
                found = recorded(tensor._local_tensor)
                assert found is not None
                if part is not None and part.storage == found.storage:
                    continue
                found.tape.after_block.waiting.forget(found.storage)
                if part is not None:
                    _record_copy(found.tape, part, ref_of(meta_of(tensor._local_tensor), found.storage))

    def _has(self, tensor: DTensor) -> bool:
        found = recorded(tensor._local_tensor)
        return found is not None and found.storage in self._wholes

    def _final(self, tensor: DTensor) -> tuple[Tensor, TensorRef | None]:
        """Return the whole tensor of ``tensor``, as the block leaves it, and the part of it that is the shard."""
        found = recorded(tensor._local_tensor)
        assert found is not None
        known = self._wholes.get(found.storage)
        if known is None:
            ref, box = _origin(tensor, None)
            if ref.dtype != tensor.dtype:
                its = recorded(_copied(found.tape, ref, found.device, tensor.dtype))
                assert its is not None
                ref = ref._replace(storage=its.storage, offset=0, dtype=tensor.dtype)
            part = None if 0 in box.sizes else _part_of(ref, box)
        elif _last_writer(found.tape, found.storage) != known.last_copy:
            raise RecordingError(_MSG_CHANGED.format(shape=tuple(tensor.shape)))
        else:
            its = recorded(known.tensor)
            assert its is not None
            ref, part = ref_of(meta_of(known.tensor), its.storage), known.part
        return plain_tensor(ref, found.tape, tensor), part


def _origin(tensor: DTensor, writer: TapeWriter | None) -> tuple[TensorRef, Box]:
    """Return the recorded tensor that ``tensor`` is a part of, and which part.

    Raises:
        RecordingError: There is none.
    """
    local = tensor._local_tensor
    found = recorded(local) if writer is None else writer.lookup(local)  # which joins the tape of an earlier block
    assert found is not None
    origin = nearest_whole(found.tape, ref_of(meta_of(local), found.storage), tensor.shape)
    if origin is None and not local.numel():
        origin = _by_place(found.tape, found.storage, tensor.shape)
    with real_execution():
        part = region_of(tensor)
    if origin is None or (origin[1] is not None and origin[1] != part):
        raise RecordingError(_MSG_UNKNOWN.format(shape=tuple(tensor.shape)))
    return origin[0], part


def _by_place(tape: Tape, storage: int, shape: torch.Size) -> tuple[TensorRef, None] | None:
    """Return what an earlier block has recorded where there is a shard without elements, on ``storage``, today."""
    for owners in tape.after_block.owners:
        model = owners.model()
        for place in [] if model is None else table_entries(model, is_recorded_shard):
            found = recorded(place.tensor._local_tensor)
            if found is not None and found.storage == storage:
                for ref, _ in recorded_at(place.module, place.key, [tape]):
                    if ref.size == shape:
                        return ref, None
    return None


def _copied(tape: Tape, ref: TensorRef, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a recorded copy in ``dtype`` of the recorded tensor ``ref``."""
    with real_execution():
        meta = torch.empty_strided(ref.size, ref.stride, dtype=dtype, device="meta")
        copied = ref_of(meta, begin(meta, tape, device))
        if dtype == ref.dtype:
            tape.append(Op(now(), torch.ops.aten.clone.default, (ref,), {}, (), (copied,)))
        else:
            tape.append(Op(now(), torch.ops.aten._to_copy.default, (ref,), {"dtype": dtype}, (), (copied,)))
        return make_recorded_tensor(meta, device)


def _part_of(whole: TensorRef, box: Box) -> TensorRef:
    start = sum(at * stride for at, stride in zip(box.offsets, whole.stride, strict=True))
    return whole._replace(offset=whole.offset + start, size=torch.Size(box.sizes))


def _last_writer(tape: Tape, storage: int) -> int:
    return tape.writers.get(storage, (0,))[-1]


def _record_copy(tape: Tape, part: TensorRef, shard: TensorRef) -> int:
    number = now()
    tape.append(Op(number, torch.ops.aten.copy_.default, (shard, part), {}, (shard,), ()))
    return number
