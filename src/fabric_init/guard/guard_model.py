"""Guard a model: let its tensors wait for values from now on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.guard.before_forward import guard_forward, number_model
from fabric_init.guard.guarded_model_tensors import GuardedModelTensors
from fabric_init.planning.placement import Placement
from fabric_init.planning.tensors import Walk, Walked, named_tensors, walked
from fabric_init.recording.after_block.dispatch import AfterBlock
from fabric_init.recording.after_block.waiting_storages import THREE_WAYS, Waiting
from fabric_init.recording.tape.liveness import computed_from
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, claim, give_lazy_memory, recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag
from fabric_init.recording.tensor.wrappers import recorded_parts


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
    packed: dict[str, StorageTag] = {}
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
                if found.storage in found.tape.made_of:
                    packed[name] = found
            elif packed and kind == "attribute":
                _let_wait_beside(found, name, packed)
            if id(later) not in laters:
                laters[id(later)] = later
                later.gives_memory, later.waiting.fix = gives_memory, fix
                later.owners = [each for each in later.owners if each.model() is not walk.model]
                later.owners.append(GuardedModelTensors(walk, placement))
    if laters:
        number_model(walk.model)
        guard_forward(walk.model)
        for _, module in walk.once:
            if isinstance(module, FSDPModule):
                guard_forward(module)


def _let_wait(part: RecordedTensor, found: StorageTag, model: str, name: str, *, of_wrapper: bool) -> None:
    """Let a recorded tensor wait, and with one that a wrapper holds the plain one that it was made of."""
    waiting: Waiting = found.tape.after_block.waiting
    waiting.begin(found.storage, model, name, None if of_wrapper else recorded_ref(part, found.storage))
    plain = found.tape.made_of.get(found.storage) if of_wrapper else None
    if plain is not None:
        waiting.begin(plain.storage, model, name, plain)


def _let_wait_beside(found: StorageTag, name: str, packed: Mapping[str, StorageTag]) -> None:
    """Let what a packed parameter has in its attributes, computed from the same plain one, wait as long as it does."""
    while name and name not in packed:
        name = name.rpartition(".")[0]
    if not name:
        return
    its = packed[name]
    if computed_from(found.tape, found.storage, {its.tape.made_of[its.storage].storage}, copies=False):
        its.tape.after_block.waiting.beside[found.storage] = its.storage
