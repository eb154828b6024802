"""Turn a plan for plain tensors into one for what the model holds in their places, see [Note: made of plain tensors].

Each tensor that a wrapper holds, a packed parameter, and what lies beside one, such as its scales, gets its own init:
what computes it, on the tape, from a plain tensor. Of that tensor only the plan is left, which says what is loaded for
it, and which is a row in the report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction, swap_tensor_impl
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import FabricInitError
from fabric_init.filling.packed.on_device import packed, refuse_own_hooks
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.prepare import PreparedPlan, plan_for
from fabric_init.planning.tensors import TensorInfo, Walk, Walked, find_tensors, info_of, walked
from fabric_init.recording.tape.liveness import computed_from
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, class_of, recorded
from fabric_init.recording.tensor.wrappers import inner_tensors, is_sharded, named_parts, recorded_parts
from fabric_init.sharding.dtensor import local
from fabric_init.sharding.packed_weights import HeldInstead, as_plain_model, is_packed, wraps

_NONE: Mapping[int, HeldInstead] = MappingProxyType({})


def plan_plain(model: Walked, reader: CheckpointReader | None, options: LoadOptions) -> PreparedPlan:
    """Return the plan for ``model``, which has no wrappers, with what its packed tensors were made of in their places.

    Raises:
        FabricInitError: Anything that the user has to fix; no memory is allocated before.
    """
    walk = walked(model)
    refuse_own_hooks(walk, reader)
    with as_plain_model(walk, is_packed) as shown:
        prepared = plan_for(shown.walk, reader, options)
    both = [
        (entry, held)
        for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True)
        for held in shown.held(tensor)
    ]
    plan = replace(prepared.plan, entries=tuple(entry for entry, _ in both))
    return prepared._replace(plan=plan, tensors=[tensor for _, tensor in both])


def pack_and_plan_held(
    prepared: PreparedPlan, model: Walked, placement: Placement, plain: Mapping[int, HeldInstead] = _NONE
) -> PreparedPlan:
    """Return :func:`plan_held` of a plan, once parameters have been packed that their library packs on their device.

    Args:
        prepared: The plan for plain tensors.
        model: The recorded model, which by now holds what it holds.
        placement: How this rank keeps the tensors.
        plain: What is made of tensors of the plan, by the ids of these.

    Raises:
        FabricInitError: A weight was sharded before it could be packed, or was not recorded, or would not be loaded.
    """
    walk, planned_for = walked(model), prepared
    prepared = packed(prepared, walk, placement)
    try:
        return plan_held(prepared, walk if prepared is planned_for else Walk(walk.model), plain)
    except BaseException:
        if prepared.undo is not None:
            prepared.undo()
        raise


def plan_held(prepared: PreparedPlan, model: Walked, plain: Mapping[int, HeldInstead] = _NONE) -> PreparedPlan:
    """Return a plan for what ``model`` holds in the places of plain tensors, which are read or computed for that."""
    entries: list[tuple[PlanEntry, Tensor]] = []
    tapes = dict(prepared.tapes)
    for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True):
        its = plain.get(id(tensor)) or _packed_since(entry, tensor)
        entries += [(entry, tensor)] if its is None else _in_place_of(entry, tensor, its, tapes)
    held = {id(entry) for entry, _ in entries}
    sources = {
        source.slot.ref.storage: source
        for entry, _ in entries
        if (source := entry.made_of) is not None and source.slot.ref is not None and id(source) not in held
    }
    if sources:
        entries += _beside(model, {id(tensor) for _, tensor in entries}, tapes)
        entries = [(_lies_beside(entry, sources, tapes, exact=prepared.exact), tensor) for entry, tensor in entries]
    plan = replace(prepared.plan, entries=tuple(entry for entry, _ in entries))
    return prepared._replace(plan=plan, tensors=[tensor for _, tensor in entries], tapes=tapes)


def _packed_since(entry: PlanEntry, tensor: Tensor) -> HeldInstead | None:
    """Return what has become of a parameter that has been packed since it was planned for."""
    found = recorded(tensor) if isinstance(tensor, RecordedTensor) and isinstance(tensor, nn.Parameter) else None
    if found is None or entry.made_of is not None or entry.slot.ref is None or found.storage == entry.slot.ref.storage:
        return None
    return HeldInstead({entry.slot.name: tensor}, kept=False)


def _in_place_of(
    entry: PlanEntry, plain: Tensor, its: HeldInstead, tapes: dict[int, Tape]
) -> list[tuple[PlanEntry, Tensor]]:
    """Return the plan for each tensor without values that is made of the ``plain`` one, and the tensor."""
    ref = entry.slot.ref
    assert ref is not None
    stays = [(entry, plain)] if its.kept else []
    parts: list[tuple[TensorInfo, str, Tensor]] = []
    is_computed = False
    for name, held in its.held.items():
        kind = class_of(local(held)).__name__
        for key, part in named_parts(held, name) if wraps(held) else [("", held)]:
            found = recorded(part)
            if found is None or found.memory is not None:
                continue
            with DisableTorchFunction():
                info = info_of((key,) if key else entry.slot.names, entry.slot.kind, part)
            assert info is not None
            tapes[found.storage] = found.tape
            is_computed |= found.storage == ref.storage
            is_computed |= bool(computed_from(found.tape, found.storage, [ref.storage], copies=True))
            if info.ref == ref and not stays:  # a wrapper that only says what is to be done with it
                stays = [(entry._replace(kind=kind), part)]
            else:
                parts.append((info, kind, part))
    if not is_computed:
        raise FabricInitError(f"{entry.slot.name} is no longer computed from what is loaded for it, or initialized")
    source = stays[0][0] if stays else entry
    made_of_it = [(PlanEntry(info, Action.INIT, made_of=source, kind=kind), part) for info, kind, part in parts]
    return stays + made_of_it


def _beside(model: Walked, known: Collection[int], tapes: dict[int, Tape]) -> Iterator[tuple[PlanEntry, Tensor]]:
    """Yield the plans for recorded tensors that ``model`` has as attributes and that are not ``known``, and these."""
    for info, tensor in find_tensors(model):
        found = recorded(tensor) if info.kind == "attribute" and id(tensor) not in known else None
        if found is not None:
            tapes[found.storage] = found.tape
            yield PlanEntry(info, Action.INIT), tensor


def _lies_beside(
    entry: PlanEntry, sources: Mapping[int, PlanEntry], tapes: Mapping[int, Tape], *, exact: bool
) -> PlanEntry:
    """Return the plan for a tensor, which says so if it lies beside what is made of one of the ``sources``."""
    ref = entry.slot.ref
    if ref is None or entry.slot.kind != "attribute" or entry.action is not Action.INIT or entry.made_of is not None:
        return entry
    found = computed_from(tapes[ref.storage], ref.storage, sources, copies=True, exact=exact)
    return entry._replace(made_of=sources[found.pop()]) if len(found) == 1 else entry


def follow_inner(wrappers: Iterable[Tensor]) -> None:
    """Let wrappers, which stay the same objects, be on the device that the tensors in them are on by now."""
    for wrapper in wrappers:
        if is_sharded(wrapper) or recorded_parts(wrapper):
            continue  # a mesh says where it is; it waits still
        inner, (_, context) = inner_tensors(wrapper), wrapper.__tensor_flatten__()  # type: ignore[attr-defined]
        device = next(iter(inner.values())).device
        if wrapper.device == device:
            continue
        for name, tensor in inner.items():
            if tensor.device != device:  # one that was not recorded
                inner[name] = tensor.to(device)
                setattr(wrapper, name, inner[name])
        moved = type(wrapper).__tensor_unflatten__(inner, context, wrapper.size(), wrapper.stride())  # type: ignore[attr-defined]
        swap_tensor_impl(wrapper, moved.requires_grad_(wrapper.requires_grad))
