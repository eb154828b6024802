"""Where the parameters and buffers of a guarded model are, by recorded storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import cached_property

from torch import Tensor, nn

from fabric_init.guard.before_forward import guard_forward, release_forward
from fabric_init.guard.waiting_tensors import unfilled
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import TensorInfo, Walk, find_tensors
from fabric_init.recording.tape.tape import TensorRef
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become, recorded, recorded_ref
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.reports.registry import note_status


class GuardedModelTensors:
    """Where the parameters and buffers of a model are, by recorded storage. Keeps nothing alive."""

    def __init__(self, walk: Walk, placement: Placement | None = None) -> None:
        self._model = weakref.ref(walk.model)
        self._placement = placement
        self._infos: dict[int, TensorInfo] = {}
        if placement is not None and type(placement) is not WholeTensors:
            self._infos = {info.ref.storage: info for info, _ in find_tensors(walk) if info.ref is not None}
        self._name = type(walk.model).__name__
        self._all = [
            (reference, name, ref)
            for _, module in walk.once
            for table in (module._parameters, module._buffers)
            if table and (reference := weakref.ref(module))
            for name, tensor in table.items()
            if tensor is not None
            for ref in _refs_of(tensor)
        ]

    # Most models are filled as a whole, and nobody asks where one tensor of theirs is.

    @cached_property
    def _places(self) -> dict[int, list[tuple[weakref.ref[nn.Module], str]]]:
        """By storage."""
        places: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
        for reference, name, ref in self._all:
            places.setdefault(ref.storage, []).append((reference, name))
        return places

    @cached_property
    def _refs(self) -> dict[tuple[int, str], list[TensorRef]]:
        """By id of the module, and name."""
        refs: dict[tuple[int, str], list[TensorRef]] = {}
        for reference, name, ref in self._all:
            refs.setdefault((id(reference()), name), []).append(ref)
        return refs

    @cached_property
    def _left(self) -> set[int]:
        """Return the storages that have no values yet."""
        return set(self._places)

    def filled(self, storage: int, status: str) -> None:
        """Note that what was on ``storage`` has its values; a model that has all needs no hook any more."""
        for reference, name in self._places.get(storage, ()):
            module = reference()
            if module is not None:
                note_status(module, name, status)
        self._left.discard(storage)
        model = self._model()
        if not self._left and model is not None and not unfilled(model):
            release_forward(model, on_all_ranks=False)

    def model(self) -> nn.Module | None:
        """Return the model, if it still lives."""
        return self._model()

    def gathered_for(self, module: nn.Module) -> None:
        """Let ``module`` refuse to run before torch gathers tensors of the model for it from other ranks."""
        guard_forward(module)

    def has(self, storage: int) -> bool:
        """Return whether a tensor of the model was on ``storage``."""
        return storage in self._places

    def put(self, storage: int, tensor: Tensor, value: Tensor) -> None:
        """Give ``tensor``, which was on ``storage``, the memory of ``value``, or what its strategy keeps of that."""
        if self._placement is None or storage not in self._infos:
            become(tensor, value)
        else:
            self._placement.put(self._infos[storage], tensor, value)

    def now(self, storage: int) -> Iterator[Tensor]:
        """Yield what is today where tensors on ``storage`` were."""
        for reference, name in self._places.get(storage, ()):
            module = reference()
            tensor = None if module is None else module._parameters.get(name, module._buffers.get(name))
            if tensor is not None:
                yield tensor

    def at(self, module: nn.Module, name: str) -> Iterator[TensorRef]:
        """Yield the places that the tensor ``name`` of ``module`` had on the tape."""
        for ref in self._refs.get((id(module), name), ()):
            if any(reference() is module for reference, key in self._places[ref.storage] if key == name):
                yield ref

    def recorded(self, storage: int) -> Iterator[Tensor]:
        """Yield those of them that are still on ``storage``."""
        for tensor in self.now(storage):
            for part in recorded_parts(tensor):
                found = recorded(part)
                if found is not None and found.storage == storage:
                    yield part

    def unfilled(self) -> tuple[str, dict[int, str]]:
        """Return the class of the model, and the names of its tensors that wait, by recorded storage."""
        model = self._model()
        names: dict[int, str] = {}
        for name, tensor in [] if model is None else unfilled(model):
            for part in recorded_parts(tensor):
                record = recorded(part)
                if record is not None:
                    names.setdefault(record.storage, name)  # several objects may be on one storage
        return self._name, names


def _refs_of(tensor: Tensor) -> set[TensorRef]:
    if type(tensor) is RecordedTensor:  # nearly all
        return set() if (found := recorded(tensor)) is None else {recorded_ref(tensor, found.storage)}
    both = ((part, found) for part in recorded_parts(tensor) if (found := recorded(part)) is not None)
    return {recorded_ref(part, found.storage) for part, found in both}
