"""Which tensors of a model wait for values, and what they wait for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fabric_init.planning.tensors import Walked, named_tensors, registered_tensors
from fabric_init.recording.after_block.dispatch import AfterBlock
from fabric_init.recording.after_block.waiting_storages import THREE_WAYS
from fabric_init.recording.tape.liveness import never_written
from fabric_init.recording.tape.random_streams import own_init_runs
from fabric_init.recording.tensor.recorded_tensor import recorded, recorded_ref
from fabric_init.recording.tensor.wrappers import recorded_parts


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


def is_held(model: nn.Module) -> bool:
    """Return whether ``model`` itself, and not one that it is a part of, waits for values."""
    found = (recorded(part) for _, _, tensor in registered_tensors(model) for part in recorded_parts(tensor))
    return any(
        each.model() is model for record in found if record is not None for each in record.tape.after_block.owners
    )


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


def fix_of(model: nn.Module) -> str | None:
    """Return what the user has to do before ``model`` can be set up; ``None`` where a later load may bring values."""
    for _, tensor in unfilled(model):
        for part in recorded_parts(tensor):
            found = recorded(part)
            if found is not None and (fix := found.tape.after_block.waiting.fix) != THREE_WAYS:
                return str(fix)
    return None


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


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of ``module`` itself, with their names in it."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor
