"""Execute a plan: read or replay each tensor once, straight to where its strategy keeps it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._gc import PausedCollector
from fabric_init._interrupts import interrupts_held
from fabric_init._text import dtype_name
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader, rename_keys
from fabric_init.checkpoints.region import take
from fabric_init.distributed.agreement import Agreement, SingleProcess
from fabric_init.distributed.seeds import share_seeds
from fabric_init.errors import CheckpointMismatchError, FabricInitError, RecordingError
from fabric_init.filling.derived import compute, loads_noted
from fabric_init.filling.fill_log import with_log
from fabric_init.filling.loader import loader_for
from fabric_init.filling.looked_at import check_decisions
from fabric_init.filling.out_of_memory import out_of_memory_explained
from fabric_init.filling.progress import with_progress
from fabric_init.filling.quantizing import planned_as_floats, quantized
from fabric_init.filling.verify import is_wanted, verify
from fabric_init.filling.wrapped import InnerValues, follow_inner
from fabric_init.guard.loads import unwatch_loads
from fabric_init.guard.models import hold_broken, release_forward, settle, unfilled
from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.digest import plan_lines
from fabric_init.planning.loads import read_as
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, DerivedFrom, LoadOptions, Plan, PlanEntry, storage_groups
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import Walk
from fabric_init.recording.liveness import covers
from fabric_init.recording.replay import real_execution, replay, view
from fabric_init.recording.tape import Rng, Tape
from fabric_init.recording.tensor import RecordedTensor
from fabric_init.recording.wrappers import with_memory
from fabric_init.reports.provenance import describe_rule
from fabric_init.reports.registry import FillRecord, RowRecord, keep_record, statuses
from fabric_init.reports.rows import InitRow
from fabric_init.reports.trace import recording_of
from fabric_init.sharding.dtensor import ShardedTensors
from fabric_init.sharding.whole import refuse_flat_parameters, seen_whole, without_torchs_load_hooks
from fabric_init.sharding.wrapped import Wrapped, seen_plain

_NOTHING_WRAPPED: Mapping[int, Wrapped] = MappingProxyType({})


def check_ties(plan: Plan, reader: CheckpointReader | None, placement: Placement) -> None:
    """Check, before memory is allocated, that tied tensors have one value in the checkpoint.

    Raises:
        CheckpointMismatchError: A tied tensor has different values under its keys.
    """
    if reader is not None:
        with torch.inference_mode(False), real_execution():
            loader_for(reader).check_ties(plan, placement)


def fill(
    plan: Plan,
    tensors: Sequence[Tensor],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    placement: Placement,
    *,
    exact: bool,
    loaded: Mapping[int, DerivedFrom] | None = None,
    wrapped: Mapping[int, Wrapped] = _NOTHING_WRAPPED,
) -> FillRecord:
    """Fill every tensor. The model does not change before all values have been computed.

    Args:
        plan: From :func:`~fabric_init.planning.validation.make_plan`.
        tensors: The tensors of the plan's entries, in that order.
        tapes: The tape of each recorded storage.
        reader: The checkpoint that loaded tensors are read from.
        placement: How this rank keeps the tensors.
        exact: Replay the random streams in order (``rng="eager"``).
        loaded: The loaded tensors that others may be computed from, if the plan is only a part of one.
        wrapped: By position in the plan: what is made of that tensor, which the model may not hold itself.

    Returns:
        The rows of the report.

    Raises:
        OutOfMemoryError: Memory has run out; the model has not changed.
    """
    loaded = loaded if loaded is not None else loaded_storages(plan, tapes)
    with torch.inference_mode(False), real_execution():
        values: dict[int, Tensor] = {}
        inner = InnerValues(wrapped)
        with out_of_memory_explained(plan, values), ExitStack() as stack:
            each = _values(plan, tensors, tapes, reader, placement, loaded, wrapped, exact=exact)
            items = stack.enter_context(closing(each))
            logged = stack.enter_context(closing(with_log(items, plan, tapes)))
            shown = stack.enter_context(closing(with_progress(logged, len(plan.entries))))
            for position, value in shown:  # closed at once, and their threads with them, when it does not end
                if inner.take(position, value, placement.device(plan.entries[position].slot), exact=exact):
                    values[position] = value
            _keep_apart(plan, values)
    with DisableTorchFunction():
        as_built = any(tensor.is_inference() for tensor in tensors)
    # tensor subclasses (DTensor) need their own dispatch here
    with interrupts_held(), torch.inference_mode(as_built), torch.no_grad(), DisableTorchFunction():
        filled = list(tensors)
        for position, value in values.items():
            filled[position] = placement.put(plan.entries[position].slot, tensors[position], value)
        inner.put(filled)
        _check(plan, filled)
        if reader is not None and is_wanted():
            verify(plan, filled, reader, placement)
    record = make_record(plan, tapes, reader)
    inner.note(record.rows)
    return record


def _values(
    plan: Plan,
    tensors: Sequence[Tensor],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    placement: Placement,
    loaded: Mapping[int, DerivedFrom],
    passing: Collection[int],
    *,
    exact: bool,
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield positions in the plan and the values that this rank keeps for them; those at ``passing`` only for now."""
    entries = plan.entries
    to_replay = {
        storage: positions
        for storage, group in storage_groups(entries).items()
        if (positions := [position for position in group if not _has_room_of_its_own(entries[position])])
        if not _is_loaded_whole(entries, positions, tapes[storage])
        if not any(entries[position].action is Action.WAIT or entries[position].on_use for position in positions)
    }
    shared = {
        position
        for positions in to_replay.values()
        for position in positions
        # a rank that keeps a region has memory of its own for each, so only what is not loaded needs the others
        if placement.region(entries[position].slot) is None
        or any(entries[other].action is not Action.LOAD for other in positions)
    }
    parts: dict[int, Tensor] = {}  # loaded into memory that other tensors share
    if reader is not None:
        for position, value in loader_for(reader).load(plan, placement):
            if position in shared:
                parts[position] = value
            else:
                yield position, value
        for positions in to_replay.values():
            for position in positions:  # in the same order on every rank
                slot = entries[position].slot
                if position in parts and placement.region(slot) is not None:
                    parts[position] = read_as(reader, entries[position].keys[0], slot.shape, None)
        mine = {storage: [position for position in group if position in shared] for storage, group in to_replay.items()}
        to_replay = {storage: group for storage, group in mine.items() if group}
    for position, entry in enumerate(entries):
        slot = entry.slot
        if slot.ref is None and entry.action is not Action.LOAD and slot.real:
            device = placement.device(slot)
            if device != slot.device:
                yield position, tensors[position].detach().to(device)
    derived = _derived(entries, to_replay, tapes, placement, loaded, exact=exact)
    for (tape, device, sources), storages in derived.items():
        assert reader is not None
        memories = compute(storages, tape, [loaded[source] for source in sources], reader, device, exact=exact)
        for storage in storages:
            memory = memories.pop(storage)
            for position in to_replay.pop(storage):
                yield position, _kept(memory, entries[position], placement)
            del memory  # not kept while the next one is read
    short, others = _apart(to_replay, () if exact else passing)
    yield from _replayed(entries, others, tapes, parts, placement, exact=exact)
    yield from _replayed(entries, short, tapes, parts, placement, exact=exact, threads=1)  # none is made ahead


def _derived(
    entries: Sequence[PlanEntry],
    groups: Mapping[int, Sequence[int]],
    tapes: Mapping[int, Tape],
    placement: Placement,
    loaded: Mapping[int, DerivedFrom],
    *,
    exact: bool,
) -> dict[tuple[Tape, torch.device, frozenset[int]], list[int]]:
    """Return the storages that are computed from loaded ones, those together that are computed from the same."""
    found: dict[tuple[Tape, torch.device, frozenset[int]], list[int]] = {}
    for storage, positions in groups.items():
        entry = entries[positions[0]]
        sources = frozenset(sources_of(entry, tapes, loaded, exact=exact))
        if sources and all(entries[position].action is Action.INIT for position in positions):
            key = tapes[storage], placement.device(entry.slot), sources
            found.setdefault(key, []).append(storage)
    return found


def _kept(memory: torch.UntypedStorage, entry: PlanEntry, placement: Placement) -> Tensor:
    """Return this rank's part of a tensor whose storage is ``memory``."""
    assert entry.slot.ref is not None
    value, region = view(memory, entry.slot.ref), placement.region(entry.slot)
    return value if region is None else take(value, region).clone()


_Groups = dict[int, Sequence[int]]


def _apart(groups: Mapping[int, Sequence[int]], chosen: Collection[int]) -> tuple[_Groups, _Groups]:
    """Return the groups all of whose positions are ``chosen``, and the others."""
    inside = {storage for storage, positions in groups.items() if all(each in chosen for each in positions)}
    within = {storage: positions for storage, positions in groups.items() if storage in inside}
    return within, {storage: positions for storage, positions in groups.items() if storage not in inside}


def _has_room_of_its_own(entry: PlanEntry) -> bool:
    """Whether a tensor that was recorded as expanded is loaded: its elements may differ in the file."""
    return entry.action is Action.LOAD and entry.slot.ref is not None and entry.slot.ref.expanded


def _is_loaded_whole(entries: Sequence[PlanEntry], positions: Sequence[int], tape: Tape) -> bool:
    """Return whether a storage is spanned by one loaded tensor, so that nothing of it has to be replayed."""
    slot, action, *_ = entries[positions[0]]
    assert slot.ref is not None
    return len(positions) == 1 and action is Action.LOAD and covers(tape, slot.ref)


def _replayed(
    entries: Sequence[PlanEntry],
    groups: Mapping[int, Sequence[int]],
    tapes: Mapping[int, Tape],
    parts: dict[int, Tensor],
    placement: Placement,
    *,
    exact: bool,
    threads: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    by_tape: dict[int, list[int]] = {}
    for storage in groups:
        by_tape.setdefault(id(tapes[storage]), []).append(storage)
    for storages in by_tape.values():
        tape = tapes[storages[0]]
        targets = {placement.device(entries[groups[storage][0]].slot) for storage in storages}
        for target in sorted(targets, key=str):
            here = [s for s in storages if placement.device(entries[groups[s][0]].slot) == target]
            wanted: Iterable[dict[int, torch.UntypedStorage]] = replay(
                tape,
                here,
                exact=exact,
                threads=threads,
                to=lambda _, target=target: target,  # type: ignore[misc]
            )
            for memories in wanted:
                for storage, memory in memories.items():
                    for position in groups[storage]:
                        entry = entries[position]
                        if position in parts:
                            assert entry.slot.ref is not None
                            view(memory, entry.slot.ref).copy_(parts.pop(position))
                        yield position, _kept(memory, entry, placement)


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
        storage = None if entry.slot.ref is None or _has_room_of_its_own(entry) else entry.slot.ref.storage
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


def make_record(plan: Plan, tapes: Mapping[int, Tape], reader: CheckpointReader | None) -> FillRecord:
    """Return the rows of the report for the entries of a plan."""
    records = []
    for entry in plan.entries:
        slot = entry.slot
        origin = ""
        if entry.action is Action.LOAD:
            origin = ", ".join(entry.keys)
            if entry.spec is not None and entry.spec.made:
                origin += f" ({entry.spec.made})"
        elif entry.action is Action.INIT and slot.ref is not None:
            origin = describe_rule(tapes[slot.ref.storage], slot.ref)
            if entry.keys:
                origin = f"{', '.join(entry.keys)}, {origin}"
        row = InitRow(
            name=slot.name,
            status=Action.LOAD.value if entry.keys else entry.action.value,
            shape=tuple(slot.shape),
            dtype=dtype_name(slot.dtype),
            kind=slot.kind,
            origin=origin,
            cast_from=None if entry.cast_from is None else dtype_name(entry.cast_from),
            ties=slot.names[1:],
            recording=None if slot.ref is None else recording_of(slot, tapes[slot.ref.storage]),
        )
        records.append(RowRecord(row))
        if entry.action is Action.WAIT and slot.ref is not None:
            records[-1].waits_on(tapes[slot.ref.storage], slot.ref.storage)
    path = None if reader is None else str(reader.path)
    return FillRecord(records, path, note_of(plan, reader), plan.unexpected)


def note_of(plan: Plan, reader: CheckpointReader | None) -> str | None:
    """Return what the user should know of how a checkpoint was read, and of what was loaded from it."""
    return "; ".join(filter(None, [reader.note, *plan.notes])) or None if reader is not None else None


_ALONE = SingleProcess()


_PLANNING = "planning the initialization"


def fill_model(
    model: nn.Module,
    reader: CheckpointReader | None,
    wanted: LoadOptions,
    placement: Placement,
    rng: Rng | None = None,
    agreement: Agreement = _ALONE,
    partition: Callable[[], Placement] | None = None,
) -> FillRecord:
    """Plan for ``model`` and fill it, on all ranks together.

    Args:
        model: The recorded model.
        reader: The open checkpoint; ``None`` to initialize everything.
        wanted: How to load it.
        placement: How this rank keeps the tensors.
        rng: The order of random numbers; ``None`` for that of the recording.
        agreement: How the ranks keep in step.
        partition: Partitions the parameters, once all is planned, and returns how the rank then keeps them; if it, or
            what comes after it, fails, the model cannot be used any more.

    Raises:
        FabricInitError: Anything that the user has to fix.
    """

    sharded: dict[str, DTensor] = {}
    wrapped: dict[int, Wrapped] = {}
    apart: list[Tensor] = []

    def plan() -> PreparedPlan:
        walk = Walk(model)
        refuse_flat_parameters(walk)
        settle(walk)
        names = () if reader is None else rename_keys(reader.keys(), wanted.rename).values()
        with without_torchs_load_hooks(walk), seen_whole(walk) as shards, seen_plain(walk, set(names)) as shown:
            prepared = planned_as_floats(walk, reader, wanted, rng)
            _refuse_overwriting(prepared, model)
            _refuse_casts(prepared, shown.apart)
            prepared = quantized(prepared, model, placement)
        wrapped.update((at, shown.plain[id(t)]) for at, t in enumerate(prepared.tensors) if id(t) in shown.plain)
        apart.extend(shown.apart.values())
        tensors = [shards.get(id(tensor), tensor) for tensor in prepared.tensors]
        sharded.update(
            (entry.slot.name, tensor)
            for entry, tensor in zip(prepared.plan.entries, tensors, strict=True)
            if isinstance(tensor, DTensor)
        )
        return prepared._replace(tensors=tensors)

    with PausedCollector():
        prepared = agreement.run_together(_PLANNING, plan, plan_lines)
        where = ShardedTensors(sharded, placement) if sharded else placement
        try:
            share_seeds(prepared.tapes.values(), agreement)
            with loads_noted(prepared), _partitioned(model, partition, where, agreement) as where:
                record = execute_plan(prepared, model, prepared.tensors, where, agreement, wrapped)
            for wrapper in apart:
                follow_inner(wrapper)
            return record
        except BaseException:
            if prepared.undo is not None:
                prepared.undo()
            raise


@contextmanager
def _partitioned(
    model: nn.Module, partition: Callable[[], Placement] | None, placement: Placement, agreement: Agreement
) -> Iterator[Placement]:
    """Context in which ``model`` is partitioned, if it is to be; yields how this rank then keeps it."""
    if partition is None:
        yield placement
        return
    try:
        yield agreement.run_together("partitioning the model", partition)
    except BaseException:
        hold_broken(model)
        raise


def _refuse_casts(prepared: PreparedPlan, apart: Mapping[int, Tensor]) -> None:
    """Raise if what is inside a wrapper is of another dtype in the checkpoint: its bits would mean something else."""
    for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True):
        if id(tensor) in apart and entry.cast_from is not None and prepared.reader is not None:
            raise CheckpointMismatchError(
                f"{prepared.reader.path}: {entry.keys[0]} is {dtype_name(entry.cast_from)}, and "
                f"{dtype_name(entry.slot.dtype)} in the {type(apart[id(tensor)]).__name__} of the model. Quantize the "
                "model as the checkpoint was."
            )


def _refuse_overwriting(prepared: PreparedPlan, model: nn.Module) -> None:
    """Raise if a load that is declared after the block would overwrite what the user has written since."""
    noted = statuses(model)
    lost = []
    for entry in prepared.plan.entries if prepared.reader is not None else ():
        slot = entry.slot
        if entry.action is Action.LOAD and slot.ref is not None:
            tape = prepared.tapes[slot.ref.storage]
            since = tape.waits.get(slot.ref.storage)
            if since is not None and tape.written_since(slot.ref.storage, since):
                lost.append(slot.name)
        elif entry.action is Action.LOAD and noted.get(slot.name) == "written by the user":
            lost.append(slot.name)
    if lost:
        raise RecordingError(
            f"{', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}: written after the recorded block, which the "
            "checkpoint would overwrite. Write once the model is filled, or load with load_state_dict and "
            "strict=False what you want loaded."
        )


def prepare(
    model: nn.Module,
    reader: CheckpointReader | None,
    wanted: LoadOptions,
    agreement: Agreement = _ALONE,
) -> PreparedPlan:
    """Return the plan for ``model``, made on all ranks together; see :func:`planned_as_floats`."""
    prepared = agreement.run_together(_PLANNING, lambda: planned_as_floats(model, reader, wanted), plan_lines)
    with loads_noted(prepared):
        return prepared


def execute_plan(
    prepared: PreparedPlan,
    model: nn.Module,
    tensors: Sequence[Tensor],
    placement: Placement,
    agreement: Agreement = _ALONE,
    wrapped: Mapping[int, Wrapped] = _NOTHING_WRAPPED,
) -> FillRecord:
    """Execute a plan on ``tensors``: its own, or those that a strategy has made of them."""
    plan, _, tapes, reader, exact, *_ = prepared

    def check_and_fill() -> FillRecord:
        check_ties(plan, reader, placement)
        check_decisions(prepared)
        return fill(plan, tensors, tapes, reader, placement, exact=exact, wrapped=wrapped)

    record = agreement.run_together("filling the model", check_and_fill)
    walk = Walk(model)
    if not plan.waits and not unfilled(walk):
        unwatch_loads(walk)
        release_forward(walk)
        for tape in {tape.current() for tape in tapes.values()}:
            tape.later.finish(())  # what closures and caches hold
    for _, module in walk.once:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN's layout: the constructor's own call came before there was memory
    early = statuses(walk)
    for row, entry in zip(record.rows, plan.entries, strict=True):
        if entry.action is Action.KEEP and entry.slot.name in early:
            row.update(status=early[entry.slot.name])
    keep_record(model, record)
    return record
