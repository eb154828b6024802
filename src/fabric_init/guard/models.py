"""Models whose tensors wait for values: where these are, who has to have them, and what is said otherwise."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.distributed.agreement import Agreement, agreement_among
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.guard.expected_load import expected_load
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import (
    TensorInfo,
    Walk,
    Walked,
    find_tensors,
    named_tensors,
    registered_tensors,
    walked,
)
from fabric_init.recording.after_block.dispatch import MSG_JIT_TRACE, AfterBlock
from fabric_init.recording.after_block.waiting import THREE_WAYS, Waiting, uninitialized
from fabric_init.recording.replay.tracing import is_jit_traced
from fabric_init.recording.tape.liveness import never_written
from fabric_init.recording.tape.random_streams import own_init_runs
from fabric_init.recording.tensor.recorded_tensor import (
    RecordedTensor,
    become,
    claim,
    give_lazy_memory,
    recorded,
    recorded_ref,
)
from fabric_init.recording.tensor.storage_tags import StorageTag
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.reports.registry import note_status
from fabric_init.sharding.dtensor import local, ranks_with_shards
from fabric_init.sharding.whole import let_empty_shards_wait

_RANKS = "_fabric_init_ranks"
_BROKEN = "_fabric_init_broken"


def guard_model(
    model: Walked, fix: str = THREE_WAYS, *, gives_memory: bool = True, placement: Placement | None = None
) -> None:
    """Let all that ``state_dict`` holds of ``model`` wait for values from now on.

    Args:
        model: just built in a recorded block.
        fix: what the errors say that the user has to do.
        gives_memory: whether a tensor that is overwritten gets its memory at once.
        placement: how its strategy keeps tensors that get values; ``None`` if that is not known yet.
    """
    walk, laters, cls = walked(model), dict[int, AfterBlock](), type(model.model if isinstance(model, Walk) else model)
    for name, kind, tensor in named_tensors(walk):
        if not isinstance(tensor, RecordedTensor):
            with DisableTorchFunction(), torch.no_grad():
                if is_lazy(tensor):
                    give_lazy_memory(tensor)
                else:
                    claim(tensor)
        for part in recorded_parts(tensor):
            found = recorded(part)
            if found is None:
                continue
            later: AfterBlock = found.tape.after_block
            if kind in ("parameter", "buffer") and found.memory is None:
                _let_wait(part, found, cls.__name__, name, of_wrapper=part is not tensor)
            if id(later) not in laters:
                laters[id(later)] = later
                later.gives_memory, later.waiting.fix = gives_memory, fix
                later.owners = [each for each in later.owners if each.model() is not walk.model]
                later.owners.append(GuardedModelTensors(walk, placement))
    if laters:
        guard_forward(walk.model)
        for _, module in walk.once:
            if isinstance(module, FSDPModule):
                guard_forward(module)


def is_held(model: nn.Module) -> bool:
    """Return whether ``model`` itself, and not one that it is a part of, waits for values."""
    found = (recorded(part) for _, _, tensor in registered_tensors(model) for part in recorded_parts(tensor))
    return any(
        each.model() is model for record in found if record is not None for each in record.tape.after_block.owners
    )


def _let_wait(part: RecordedTensor, found: StorageTag, model: str, name: str, *, of_wrapper: bool) -> None:
    """Let a recorded tensor wait, and with one that a wrapper holds the plain one that it was made of."""
    waiting: Waiting = found.tape.after_block.waiting
    waiting.begin(found.storage, model, name, None if of_wrapper else recorded_ref(part, found.storage))
    plain = found.tape.made_of.get(found.storage) if of_wrapper else None
    if plain is not None:
        waiting.begin(plain.storage, model, name, plain)


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
            (weakref.ref(module), name, storage)
            for _, module in walk.once
            if module._parameters or module._buffers
            for name, tensor in own_tensors(module)
            for storage in _storages_of(tensor)
        ]

    # Most models are filled as a whole, and nobody asks where one tensor of theirs is.

    @cached_property
    def _places(self) -> dict[int, list[tuple[weakref.ref[nn.Module], str]]]:
        """By storage."""
        places: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
        for reference, name, storage in self._all:
            places.setdefault(storage, []).append((reference, name))
        return places

    @cached_property
    def _storages(self) -> dict[tuple[int, str], list[int]]:
        """By id of the module, and name."""
        storages: dict[tuple[int, str], list[int]] = {}
        for reference, name, storage in self._all:
            storages.setdefault((id(reference()), name), []).append(storage)
        return storages

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

    def at(self, module: nn.Module, name: str) -> Iterator[int]:
        """Yield the storages that the tensor ``name`` of ``module`` was on."""
        for storage in self._storages.get((id(module), name), ()):
            if any(reference() is module for reference, key in self._places[storage] if key == name):
                yield storage

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


def _storages_of(tensor: Tensor) -> set[int]:
    if type(tensor) is RecordedTensor:  # nearly all
        return set() if (found := recorded(tensor)) is None else {found.storage}
    return {found.storage for part in recorded_parts(tensor) if (found := recorded(part)) is not None}


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of ``module`` itself, with their names in it."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor


def release_filled(model: Walked) -> None:
    """Turn tensors of ``model`` whose values are there by now into plain ones."""
    for _, _, tensor in named_tensors(model):
        for part in recorded_parts(tensor):
            found = recorded(part)
            if found is None:
                continue
            later: AfterBlock = found.tape.after_block
            if found.memory is None:
                if found.storage not in later.waiting.statuses or not later.gives_memory:
                    continue
                later.value(part, "be read")
            later.make_plain(part)


def fix_of(model: nn.Module) -> str | None:
    """Return what the user has to do before ``model`` can be set up; ``None`` where a later load may bring values."""
    for _, tensor in unfilled(model):
        for part in recorded_parts(tensor):
            found = recorded(part)
            if found is not None and (fix := found.tape.after_block.waiting.fix) != THREE_WAYS:
                return str(fix)
    return None


def unfilled(model: Walked) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers under ``model`` that wait for values, by their first name."""
    names: dict[int, tuple[str, Tensor]] = {}
    for name, _, tensor in registered_tensors(model):
        if id(tensor) not in names and waits(tensor):
            names[id(tensor)] = name, tensor
    return list(names.values())


def waits(tensor: Tensor) -> bool:
    """Return whether ``tensor`` has to get values before it can be used."""
    found = [record for part in recorded_parts(tensor) if (record := recorded(part)) is not None]
    return any(each.memory is None and each.tape.after_block.waiting.missing([each.storage]) for each in found)


def has_own_init(tensor: Tensor) -> bool:
    """Return whether the model's own code gives all of a recorded ``tensor`` a value."""
    both = [(part, found) for part in recorded_parts(tensor) if (found := recorded(part)) is not None]
    return bool(both) and not any(never_written(its.tape, recorded_ref(part, its.storage)) for part, its in both)


def own_init_is_wanted(tensors: Iterable[Tensor]) -> None:
    """Let tensors that wait hold what the model's own init gives them."""
    for tensor in tensors:
        for part in recorded_parts(tensor):
            found = recorded(part)
            if found is not None and found.memory is None:
                found.tape.after_block.waiting.accept_own_init([found.storage])


def draw_for_own_init(model: nn.Module) -> None:
    """Draw from torch's generator for the own init of ``model``, unless its block has done so."""
    found = [recorded(part) for _, _, tensor in named_tensors(model) for part in recorded_parts(tensor)]
    for tape in {record.tape for record in found if record is not None}:
        own_init_runs(tape)


def require(model: nn.Module, use: str) -> None:
    """Raise unless every tensor under ``model`` has its values, on every rank that holds a part of it.

    Raises:
        UninitializedTensorError: naming every tensor without values, and the ways to give it some.
    """
    if any(_BROKEN in vars(module) for module in model.modules()):
        _refuse_broken(model, use)
    if (load := expected_load(model)) is not None:
        load.require(model, use)
    let_empty_shards_wait(model)
    waiting = unfilled(model)
    ranks = ranks_of(model)
    agreements = [agreement_among(each) for each in ranks_with_shards(model)] if ranks is None else [ranks]
    names = [name for name, tensor in waiting if not agreements or local(tensor).numel()]
    for each in agreements:  # of a shard without elements, this rank cannot tell
        names = each.from_all(names)
    if names:
        fixes = [fix] if (fix := fix_of(model)) is not None else []
        for each in agreements:
            fixes = each.from_all(fixes)
        raise UninitializedTensorError(uninitialized(_class_of(model), use, names, fixes[0] if fixes else THREE_WAYS))
    if waiting:
        with DisableTorchFunction(), torch.no_grad():
            for _, tensor in waiting:
                local(tensor).zero_()  # without elements; the other ranks say that theirs are filled
    release_filled(model)
    release_forward(model)


def _class_of(model: nn.Module) -> str:
    """Return the name of the user's class: ``fully_shard`` makes one of its own from it."""
    cls = type(model)
    return cls.__bases__[1].__name__ if cls.__name__.startswith("FSDP") and len(cls.__bases__) == 2 else cls.__name__


def ranks_of(model: nn.Module) -> Agreement | None:
    """Return how the ranks that only together hold ``model`` keep in step, while some of it waits."""
    return next((found for module in model.modules() if (found := vars(module).get(_RANKS)) is not None), None)


def mark_broken(model: nn.Module) -> None:
    """Let ``model``, which a strategy has changed in part before it failed, refuse to run for good."""
    vars(model)[_BROKEN] = True
    guard_forward(model)
    model.register_state_dict_pre_hook(_before_state_dict)  # its tensors may be torch's own on meta, which can be saved


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse_broken(module, "be saved")


def _refuse_broken(model: nn.Module, use: str) -> NoReturn:
    raise UninitializedTensorError(
        f"{_class_of(model)} cannot {use}: setup, or materialize, has failed and has left it in parts. Build it anew."
    )


def guard_forward(model: nn.Module, agreement: Agreement | None = None) -> None:
    """Let ``model`` refuse to run while some of it waits: before its own code starts, and on all ranks together.

    Args:
        model: a whole model, not each module in it.
        agreement: of the ranks that only together hold it, if no rank has all of it.
    """
    if agreement is not None:
        vars(model)[_RANKS] = agreement
    if not isinstance(model, torch.jit.ScriptModule):
        _remove_forward_hook(model)
        model.register_forward_pre_hook(_before_forward, prepend=True)  # before what gathers from other ranks


def release_forward(model: Walked, *, on_all_ranks: bool = True) -> None:
    """Take that back: nothing waits any more. What is still recorded, also outside the model, becomes plain.

    Args:
        model: The model.
        on_all_ranks: Whether nothing waits on the other ranks that hold parts of it. Otherwise these ask one another
            when it first runs.
    """
    walk = walked(model)
    parts = [part for _, _, tensor in named_tensors(walk) for part in recorded_parts(tensor)]
    for tape in {found.tape for part in parts if (found := recorded(part)) is not None}:
        if tape.after_block.gives_memory:  # otherwise a strategy shards first
            tape.after_block.finish(parts)
    if not on_all_ranks and ranks_with_shards(walk):
        return
    for _, module in walk.once:
        vars(module).pop(_RANKS, None)
        _remove_forward_hook(module)


def _remove_forward_hook(module: nn.Module) -> None:
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_forward] if hooks else ():
        del hooks[key]


def _before_forward(module: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():  # there the tensors themselves refuse
        return
    held = is_jit_traced() and any(recorded_parts(tensor) for _, _, tensor in named_tensors(module))
    require(module, "run")
    if held:  # the traced module has what these were, which has no memory that could be saved
        guard_forward(module)
        raise RecordingError(MSG_JIT_TRACE)
