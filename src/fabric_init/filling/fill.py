"""Fill the tensors of a plan: the model does not change before all values have been computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import FabricInitError
from fabric_init.filling.monitoring.log import with_log
from fabric_init.filling.monitoring.out_of_memory import out_of_memory_explained
from fabric_init.filling.monitoring.progress import with_progress
from fabric_init.filling.monitoring.verify import is_wanted, verify
from fabric_init.filling.values.compute_values import PlanValues, has_own_memory
from fabric_init.planning.derived import LoadedStorages, loaded_storages
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, Plan
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor
from fabric_init.recording.tensor.wrappers import with_memory


def fill(
    plan: Plan,
    tensors: Sequence[Tensor],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    placement: Placement,
    *,
    exact: bool,
    loaded: LoadedStorages | None = None,
) -> None:
    """Fill every tensor. The model does not change before all values have been computed.

    Args:
        plan: From :func:`~fabric_init.planning.make_plan.make_plan`.
        tensors: The tensors of the plan's entries, in that order.
        tapes: The tape of each recorded storage.
        reader: The checkpoint that loaded tensors are read from.
        placement: How this rank keeps the tensors.
        exact: Replay the random streams in order (``rng="eager"``).
        loaded: The loaded tensors that others may be computed from, if the plan is only a part of one.

    Raises:
        OutOfMemoryError: Memory has run out; the model has not changed.
    """
    loaded = loaded if loaded is not None else loaded_storages(plan, tapes)
    with torch.inference_mode(False), real_execution():
        values: dict[int, Tensor] = {}
        with out_of_memory_explained(plan, values), ExitStack() as stack:
            source = PlanValues(plan, tensors, tapes, reader, placement, loaded, exact)
            items = stack.enter_context(closing(source.one_by_one()))
            logged = stack.enter_context(closing(with_log(items, plan, tapes)))
            shown = stack.enter_context(closing(with_progress(logged, len(plan.entries))))
            for position, value in shown:  # closed at once, and their threads with them, when it does not end
                values[position] = value
            _keep_apart(plan, values)
    with DisableTorchFunction():
        as_built = any(tensor.is_inference() for tensor in tensors)
    # tensor subclasses (DTensor) need their own dispatch here
    with interrupts_held(), torch.inference_mode(as_built), torch.no_grad(), DisableTorchFunction():
        filled = list(tensors)
        for position, value in values.items():
            filled[position] = placement.put(plan.entries[position].slot, tensors[position], value)
        _check(plan, filled)
        if reader is not None and is_wanted():
            verify(plan, filled, reader, placement)


def _keep_apart(plan: Plan, values: dict[int, Tensor]) -> None:
    """Copy loaded tensors that share memory in a torch file, but are not tied in the model."""
    loaded = [
        (value.data_ptr(), position)
        for position, value in values.items()
        if plan.entries[position].action is Action.LOAD and value.numel()
    ]
    end, behind = 0, None
    for start, position in sorted(loaded):
        value, entry = values[position], plan.entries[position]
        storage = None if entry.slot.ref is None or has_own_memory(entry) else entry.slot.ref.storage
        if start < end and (storage is None or storage != behind):
            values[position] = value.clone()
        elif start + value.nbytes > end:
            end, behind = start + value.nbytes, storage


def _check(plan: Plan, tensors: Sequence[Tensor]) -> None:
    left = [
        entry.slot.name
        for entry, tensor in zip(plan.entries, tensors, strict=True)
        if entry.action is not Action.WAIT
        and not entry.on_use
        and any(part.is_meta or isinstance(part, RecordedTensor) for part in with_memory(tensor))
    ]
    if left:
        raise FabricInitError(f"fabric_init left these tensors on the meta device, which is a bug of its own: {left}")
