"""Find the whole tensor that a shard without values is a part of, and show a sharded model as if it were whole.

[Note: sharding recorded tensors]
``fully_shard``, ``parallelize_module`` and ``distribute_tensor`` cut each parameter with views, copy this rank's part,
and put a DTensor over the copy into the model. Of a recorded parameter all of that is recorded: the DTensor's local
tensor is a recorded tensor, computed on the tape from a box of the whole one. So nobody has to tell us how a model was
sharded, by which library, or in which order: what plans a load, or looks for the model's own init, sees the whole
tensors (:func:`as_unsharded_model`), and what fills reads the box of each that the DTensor says this rank keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.planning.tensors import Walked, modules_once, registered_tensors
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import make_recorded_tensor, meta_of, recorded
from fabric_init.recording.tensor.storage_tags import begin, ref_of
from fabric_init.recording.tensor.wrappers import is_sharded
from fabric_init.sharding.dtensor import local, region_of
from fabric_init.sharding.module_tables import TableEntry, plain_tensor, swapped_in, table_entries
from fabric_init.sharding.recorded_copies import wholes_of


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raise if FSDP1 has wrapped recorded modules: it has put their tensors into flat ones.

    Raises:
        FabricInitError: It has.
    """
    for _, module in modules_once(model):
        if type(module).__name__ == "FullyShardedDataParallel" and any(
            recorded(tensor) is not None for tensor in module.parameters()
        ):
            raise FabricInitError(
                "FullyShardedDataParallel has wrapped this recorded model before it had values. Build it again, and "
                "let FSDP fill it: with fabric_init.param_init_fn(model, checkpoint=…) as init: "
                "FullyShardedDataParallel(model, param_init_fn=init). Or shard it with fully_shard."
            )


@contextmanager
def as_unsharded_model(model: Walked, skipped: Collection[int] = ()) -> Iterator[dict[int, DTensor]]:
    """Context in which ``model`` has whole recorded tensors in the places of the DTensors that wait for values.

    Yields the DTensor for each whole tensor, by the id of that. A model without such DTensors is not touched.

    Args:
        model: The model, sharded or not.
        skipped: Ids of DTensors to leave alone.

    Raises:
        RecordingError: A shard was changed since the model was sharded, or is no part of one tensor.
        FabricInitError: Sharding has split a tie; or, in the context, a whole tensor was replaced.
    """
    found = [place for place in _waiting_entries(model) if id(place.tensor) not in skipped]
    wholes = {id(each): plain_tensor(refs[-1], tape, each, each.dtype) for each, refs, tape in _by_origin(model, found)}

    def check(changed: list[TableEntry]) -> None:
        if changed:
            raise FabricInitError(
                f"{changed[0].name} was sharded already, and the load code of its module puts another tensor in its "
                "place. Load before the model is sharded, or leave that code out."
            )

    with swapped_in([(place, {place.key: wholes[id(place.tensor)]}) for place in found], check):
        yield {id(wholes[id(place.tensor)]): place.tensor for place in found}


@contextmanager
def without_torchs_load_hooks(model: Walked) -> Iterator[None]:
    """Context in which the load hooks are out by which FSDP2 follows its shards, for loads of a model seen whole.

    Not for use in a load hook: these are walked through then.
    """
    modules = {id(place.module): place.module for place in table_entries(model, is_sharded)}
    hooks = [_without_torchs_own(module) for module in modules.values()]
    try:
        yield
    finally:
        for table, its in hooks:
            added = {key: hook for key, hook in table.items() if key not in its}
            table.clear()
            table.update(its | added)


def _without_torchs_own(module: nn.Module) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Take out the load hooks by which FSDP2 follows its shards: nothing is loaded into those while a load is planned.

    Returns:
        The table of hooks, and all that was in it.
    """
    table: dict[Any, Any] = module._load_state_dict_post_hooks
    before = dict(table)
    for key, hook in before.items():
        if str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
            del table[key]
    return table, before


def shards_of(model: nn.Module) -> dict[TensorRef, DTensor]:
    """Return the DTensors of ``model`` that wait for values, by the recorded whole tensors that each is a part of.

    These are several where it was cast.

    Raises:
        RecordingError: A shard was changed since the model was sharded, or is no part of one tensor.
        FabricInitError: Sharding has split a tie.
    """
    return {ref: tensor for tensor, refs, _ in _by_origin(model, _waiting_entries(model)) for ref in refs}


def let_empty_shards_wait(model: nn.Module) -> None:
    """Let shards without elements wait as long as the tensors do that they are parts of.

    So this rank knows of those, although it keeps nothing of them, and raises where the other ranks do.
    """
    found = [place for place in _waiting_entries(model) if not place.tensor._local_tensor.numel()]
    tapes = _tapes(model, found)
    for place in found:
        for whole, tape in recorded_at(place.module, place.key, tapes):
            if whole.size == place.tensor.shape and whole.storage in tape.waits:
                _let_empty_shard_wait(place.tensor, whole, tape)


def _by_origin(model: Walked, waiting: Sequence[TableEntry]) -> list[tuple[DTensor, list[TensorRef], Tape]]:
    """Return the DTensors at the places ``waiting``, each once, with the whole tensors that :func:`_origins` finds."""
    tapes = _tapes(model, waiting)
    names: dict[TensorRef, str] = {}
    found: dict[int, tuple[DTensor, list[TensorRef], Tape]] = {}
    for place in waiting:
        if id(place.tensor) in found:
            continue
        refs, tape = _origins(place, tapes)
        found[id(place.tensor)] = place.tensor, refs, tape
        other = names.setdefault(refs[-1], place.name)
        if other != place.name:
            raise FabricInitError(
                f"{other} and {place.name} are one tied tensor, which sharding has split in two. Shard the module that "
                "holds both as one unit."
            )
    return list(found.values())


def _waiting_entries(model: Walked) -> list[TableEntry]:
    """Return the places of DTensors whose shard has no values: a recorded one, or one without any element."""
    found = [
        place for place in table_entries(model, is_sharded) if place.tensor.device_mesh.get_coordinate() is not None
    ]
    tapes = _tapes(model, found)
    return [
        place
        for place in found
        if recorded(local(place.tensor)) is not None
        or (not place.tensor._local_tensor.numel() and any(recorded_at(place.module, place.key, tapes)))
    ]


def _tapes(model: Walked, found: Sequence[TableEntry]) -> set[Tape]:
    """Return the tapes of ``model``, if a shard without elements is among what was ``found``: nothing says its tape."""
    if all(place.tensor._local_tensor.numel() for place in found):
        return set()
    return {its.tape for _, _, tensor in registered_tensors(model) if (its := recorded(local(tensor))) is not None}


def recorded_at(module: nn.Module, key: str, tapes: Collection[Tape]) -> Iterator[tuple[TensorRef, Tape]]:
    """Yield what was recorded as tensor ``key`` of ``module`` before the model was sharded."""
    for tape in tapes:
        for owners in tape.after_block.owners:
            for ref in owners.at(module, key):
                if ref.storage in tape.after_block.waiting.views:
                    yield ref, tape
                elif ref.storage in tape.after_block.waiting.refs:
                    yield tape.after_block.waiting.refs[ref.storage], tape


def _origins(place: TableEntry, tapes: Collection[Tape]) -> tuple[list[TensorRef], Tape]:
    """Return where on which tape the whole tensor is that the DTensor at ``place`` is a part of.

    That is one place for each cast since it was recorded, the first one last.

    Raises:
        RecordingError: The shard was changed since the model was sharded, or is no part of one tensor.
    """
    sharded, part = place.tensor, local(place.tensor)
    if part.numel():
        with DisableTorchFunction():
            found = recorded(part)
            assert found is not None
            ref, tape = ref_of(meta_of(part), found.storage), found.tape
        boxes = list(wholes_of(tape, ref, sharded.shape))
        if any(box != region_of(sharded) for _, box in boxes):
            raise RecordingError(f"the shard of {place.name} was changed after the model was sharded. {_FIX}")
        if boxes:
            tape.after_block.waiting.take_place(boxes[-1][0].storage, found.storage)
            return [whole for whole, _ in boxes], tape
        if tape.after_block.waiting.origin(found.storage) != found.storage:
            raise RecordingError(
                f"the shard of {place.name} was changed after the model was sharded, or the whole tensor was computed "
                "from others after the recorded block (by torch.nn.utils.vector_to_parameters, say). Do that in the "
                "block, or once the model has values."
            )
    else:  # nothing was copied there
        for whole, tape in recorded_at(place.module, place.key, tapes):
            if whole.size == sharded.shape:
                _let_empty_shard_wait(sharded, whole, tape)
                return [whole], tape
    raise RecordingError(
        f"{place.name} is a DTensor whose local tensor of shape {tuple(part.shape)} is no part of a recorded parameter "
        f"of shape {tuple(sharded.shape)}. {_FIX}"
    )


def _let_empty_shard_wait(sharded: DTensor, whole: TensorRef, tape: Tape) -> None:
    """Put a recorded tensor in the place of a shard without elements, which waits for as long as ``whole`` does."""
    with DisableTorchFunction(), DisableTorchDispatch():
        found = recorded(sharded._local_tensor)
        if found is None or found.memory is not None or found.storage in tape.after_block.waiting.parts:
            return
        meta = torch.empty_like(meta_of(sharded._local_tensor))
        storage = begin(meta, tape, found.device)
        sharded._local_tensor = make_recorded_tensor(meta, found.device)
    tape.after_block.waiting.take_place(whole.storage, storage, copied=False)


_FIX = (
    "Fill the model right after it was sharded, and change it once it has values; or change it in the recorded block."
)
