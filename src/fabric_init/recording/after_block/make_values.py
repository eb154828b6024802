"""The values of recorded tensors when no block is open: made once if nothing is missing for them, refused otherwise."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import compress
from typing import NoReturn

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.recording.after_block.kept_values import KeptValues
from fabric_init.recording.after_block.model_tensors import ModelTensors
from fabric_init.recording.after_block.waiting_storages import Waiting, uninitialized
from fabric_init.recording.replay.replay import real_execution, storage_now, view
from fabric_init.recording.tape.call_site import caller
from fabric_init.recording.tape.liveness import never_written
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.real_memory import plain_memory, real_tensor
from fabric_init.recording.tensor.recorded_tensor import FormerTensor, RecordedTensor, become, recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag


class AfterBlockValues:
    """Has and makes the values of the recorded tensors of one tape.

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
        self.owners: list[ModelTensors] = []
        self.kept = KeptValues()
        self._lock = threading.RLock()
        self._finishes = False

    @property
    def tape(self) -> Tape:
        """The tape of the tensors that this answers for."""
        tape = self._tape()
        assert tape is not None
        return tape

    def join(self, later: AfterBlockValues) -> None:
        """Hand everything over to the answers for a later tape, which continues this one's."""
        later.gives_memory = later.gives_memory and self.gives_memory
        later.owners += self.owners
        later.kept.join(self.kept)
        later.waiting.join(self.waiting)

    def value(self, tensor: Tensor, use: str) -> Tensor:
        """Return the values of ``tensor``, on real memory, which is made once, when no block is open any more.

        Raises:
            UninitializedTensorError: they wait for a load, or nothing ever wrote them.
        """
        found = recorded(tensor)
        if found is None:
            return tensor
        with self._lock:
            ref = recorded_ref(tensor, found.storage)
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

    def memory(self, found: StorageTag, use: str) -> torch.UntypedStorage:
        """Return the memory of a recorded storage with its values.

        Raises:
            UninitializedTensorError: they wait for a load.
        """
        with self._lock:
            if found.memory is None:
                if missing := self.waiting.missing([found.storage]):
                    self.refuse(use, [found.storage, *missing])
                self._has_values(found, self._replayed(found), made_here=True)
            assert found.memory is not None
            return found.memory[0]

    def _replayed(self, found: StorageTag) -> torch.UntypedStorage:
        memory, random = storage_now(self.tape, found.storage, exact=self.tape.rng == "eager")
        if random:
            self.tape.sealed_rng = self.tape.rng
        return memory

    def true_value(self, tensor: Tensor) -> Tensor:
        """Return the values of ``tensor``."""
        return self.value(tensor, "be read")

    def look_at(self, tensor: Tensor, use: str = "be read") -> Tensor:
        """Return the values of ``tensor`` for Python to see; in a block, a load may bring others."""
        value, found = self.value(tensor, use), recorded(tensor)
        if self.block_is_open and found is not None and found.memory is None:
            self.tape.add_look(None, (recorded_ref(tensor, found.storage),), {}, caller(sys._getframe(1)))
        return value

    def has_value(self, tensor: Tensor) -> bool:
        """Return whether nothing is missing for the values of a recorded ``tensor``."""
        found = recorded(tensor)
        if found is None or found.memory is not None:
            return found is not None
        unwritten = never_written(self.tape, recorded_ref(tensor, found.storage))
        return not unwritten and not self.waiting.missing([found.storage])

    def _is_open(self, tensor: Tensor) -> bool:
        found = recorded(tensor)
        return found is not None and found.memory is None

    def _missing(self, tensors: Iterable[Tensor]) -> list[int]:
        open_ones = [found.storage for t in tensors if (found := recorded(t)) is not None and found.memory is None]
        return self.waiting.missing(open_ones)

    # -- refusing ------------------------------------------------------------------------------------------------------

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
        """Return the names of what waits of a model that is gone, except for parts that are used elsewhere."""
        known = self.waiting.names
        model = next((known[storage][0] for storage in asked if storage in known), None)
        if model is None:
            return "a tensor that was computed from others", {0: "(it is in no model)"}
        alive = [s for s, (other, _) in known.items() if other == model and (s in asked or self.tape.is_alive(s))]
        return model, {s: known[s][1] for s in alive if s in asked or self.waiting.missing([s])}

    # -- values that have come -----------------------------------------------------------------------------------------

    def _has_values(self, found: StorageTag, memory: torch.UntypedStorage, *, made_here: bool = False) -> None:
        found.memory = memory, 0
        waited = self.waiting.filled(found.storage) or self._replaces_one_that_waited(found.storage)
        if waited:
            self.waiting.note_status(found.storage, self.status)
        status = "initialized" if made_here and not waited else self.status
        for owners in self.owners:
            for tensor in list(owners.recorded(found.storage)):
                self.make_plain(tensor)
            owners.filled(self.waiting.origin(found.storage), status)

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
        """Turn recorded tensors whose values can be made by now into plain ones: these, and those kept elsewhere.

        Values are made for every storage that a tensor is on. What the search does not find, as after ``gc.freeze()``,
        becomes plain when it is used.
        """
        with self._lock:
            if self._finishes:  # a value that is made there completes a model
                return
            self._finishes = True
            try:
                for tensor in tensors:
                    self._finish(tensor)
                alive = [tag for record in list(self.tape.records.values()) if (tag := record()) is not None]
                for found in alive:
                    if found.memory is None and not self.waiting.missing([found.storage]) and self._is_written(found):
                        with suppress(RecordingError):  # all ranks have to read it together: its user is told so
                            self.memory(found, "be read")
                for each in _all_recorded() if alive else ():  # the search is worth its time
                    with suppress(RecordingError):
                        self._finish(each)
            finally:
                self._finishes = False

    def _is_written(self, found: StorageTag) -> bool:
        """Return whether a storage has no element that nothing has written."""
        numbers = self.tape.writers.get(found.storage)
        if not numbers:
            return False
        op, nbytes = self.tape.ops[numbers[0]], self.tape.storages[found.storage].nbytes
        dtype = next(ref.dtype for ref in (*op.targets, *op.outputs) if ref.storage == found.storage)
        size = torch.Size([nbytes // dtype.itemsize])
        return not never_written(self.tape, TensorRef(found.storage, 0, size, (1,), dtype))

    def _finish(self, tensor: Tensor) -> None:
        found = recorded(tensor)
        if found is None or found.tape is not self.tape or isinstance(tensor, FormerTensor):
            return
        if self.has_value(tensor):
            self.value(tensor, "be read")  # now, before anybody writes to the map of a file that it is read from
            self.make_plain(tensor)

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
                    self.put(tensor, real_tensor(found, recorded_ref(tensor, found.storage)))

    def replace(self, target: Tensor, value: Tensor) -> None:
        """Let ``target`` have the memory of ``value`` and no more to do with its recorded storage."""
        found = recorded(target)
        become(target, value, alone=True)
        if found is None or any(True for owners in self.owners for _ in owners.recorded(found.storage)):
            return  # only an alias of a tensor that goes on waiting
        if self.waiting.filled(found.storage):
            self.waiting.note_status(found.storage, self.status)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """Give a recorded tensor the memory of ``value``, or what the strategy of its model makes of that."""
        found = recorded(tensor)
        origin = -1 if found is None else self.waiting.origin(found.storage)
        owners = next((each for each in reversed(self.owners) if each.has(origin)), None)
        become(tensor, value) if owners is None else owners.put(origin, tensor, value)


def _all_recorded() -> list[Tensor]:
    """Return the recorded tensors of this process, by a search of all its objects, of which there may be a million."""
    kinds: set[type] = set()
    more: list[type] = [RecordedTensor]
    while more:
        kinds.add(kind := more.pop())
        more.extend(kind.__subclasses__())
    everything = gc.get_objects()
    return list(compress(everything, map(kinds.__contains__, map(type, everything))))  # no Python code for each


def _has_graph(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is computed with autograd, so that it cannot become another tensor."""
    with torch.no_grad():
        try:
            return tensor.grad_fn is not None
        except RuntimeError:  # a view made under no_grad, of a base that was written since
            return True
