"""The model's own init for tensors that wait, beside others that were loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints.region import take
from fabric_init.distributed.agreement import Agreement, SingleProcess
from fabric_init.distributed.seeds import share_seeds
from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.fill import fill
from fabric_init.filling.packed.plan import follow_inner, plan_held
from fabric_init.filling.values.loaded_memory import as_it_is
from fabric_init.guard.before_forward import ranks_of, release_forward
from fabric_init.guard.expected_load import forget_expected_load
from fabric_init.guard.loads import unwatch_loads
from fabric_init.guard.waiting_tensors import (
    draw_for_own_init,
    own_init_is_wanted,
    own_tensors,
    release_filled,
    unfilled,
    waits,
)
from fabric_init.planning.checks.validation import check_all_have_values
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.plan import Action, Plan, PlanEntry
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import TensorInfo, find_tensors, named_tensors, registered_tensors
from fabric_init.recording.replay.replay import all_on, replay_with, view
from fabric_init.recording.tape.liveness import computed_from, covers, never_written
from fabric_init.recording.tape.recompute import reads_any, recompute
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import become, recorded, recorded_ref
from fabric_init.recording.tensor.wrappers import is_wrapper
from fabric_init.sharding.dtensor import ShardedTensors, local
from fabric_init.sharding.packed_weights import as_plain_model, wraps
from fabric_init.sharding.whole import as_unsharded_model, let_empty_shards_wait


def initialize_missing(model: nn.Module, otherwise: Callable[[], Agreement] = SingleProcess) -> None:
    """Run the model's own recorded init for every tensor under ``model`` that still waits.

    Args:
        model: The model.
        otherwise: How the ranks keep in step that hold shards of it, if its strategy has not said so.

    Raises:
        UninitializedTensorError: the model's own code never gives some tensor a value, or it would be the wrong one.
    """
    forget_expected_load(model)
    draw_for_own_init(model)
    let_empty_shards_wait(model)
    agreement = ranks_of(model)
    if agreement is None:
        is_sharded = any(isinstance(tensor, DTensor) for _, _, tensor in registered_tensors(model))
        agreement = otherwise() if is_sharded else SingleProcess()
    with agreement.telling("init_missing"):
        apart = _shards_without_one_seed(model)
        names = agreement.from_all([name for name, tensor in apart if local(tensor).numel()])  # others may have none
        tapes = {found.tape for _, tensor in apart if (found := recorded(local(tensor)))}
        share_seeds(tapes, agreement, asked=bool(names))
        agreement.run_together("initializing what is missing", lambda: _initialize_all(model))
        release_forward(model)
        unwatch_loads(model)


def _shards_without_one_seed(model: nn.Module) -> list[tuple[str, DTensor]]:
    """Return the waiting DTensors of which the ranks may draw different numbers, with their names."""
    waiting = [(name, tensor) for name, tensor in unfilled(model) if isinstance(tensor, DTensor)]
    return [both for both in waiting if (found := recorded(local(both[1]))) and not found.tape.shares_seed]


def run_replaced_init(model: nn.Module, planned: Collection[int] = ()) -> None:
    """Run ``reset_parameters`` of the modules under ``model`` for which the user has replaced it since the block.

    Lightning calls it in ``setup``, for whatever was built with ``empty_init=True`` and has to be sharded; so litgpt's
    pretraining chooses its init. What it writes is recorded.

    Args:
        model: whose tensors are recorded still.
        planned: ids of the tensors that a declared load is about, which are left alone.
    """
    for module in model.modules():
        replaced = vars(module).get("reset_parameters")
        if replaced is None or any(True for _, tensor in own_tensors(module) if id(tensor) in planned):
            continue
        if any(waits(tensor) for _, tensor in own_tensors(module)):
            replaced()


def initialize_possible(model: nn.Module) -> None:
    """Run it for those of them that it gives a value, from what this rank has."""
    _initialize(model, partial=True)


def initialize_some(model: nn.Module, names: Collection[str]) -> None:
    """Run it for the tensors of these ``names``, whether they wait or are computed when they are used."""
    _initialize(model, partial=True, only=frozenset(names))


def _initialize_all(model: nn.Module) -> None:
    _initialize(model, partial=False)
    left = [name for name, tensor in unfilled(model) if local(tensor).numel()]
    if left:
        raise UninitializedTensorError(
            f"{', '.join(left)}: computed from tensors that had no values then, and have others now. Compute them "
            "in the init_module block, or after the load."
        )


def _initialize(model: nn.Module, *, partial: bool, only: frozenset[str] | None = None) -> None:
    release_filled(model)
    partly = {id(tensor): name for name, tensor in unfilled(model) if _is_partly_written_shard(tensor)}
    if partly and not partial:
        raise UninitializedTensorError(
            f"the model's own init would overwrite what was written into a part of {', '.join(partly.values())}. Call "
            "fabric.init_missing(model) first and write afterwards, or write the whole tensor."
        )
    held = _Held(model)
    with as_unsharded_model(model, partly) as parts:
        with as_plain_model(model, wraps) as shown:
            found = [(info, tensor) for info, tensor in find_tensors(shown.walk) if info.ref is not None]
            tapes = {info.ref.storage: its.tape for info, tensor in found if info.ref and (its := recorded(tensor))}
        plan = Plan(tuple(PlanEntry(info, Action.INIT) for info, _ in found))
        exact = {tape.rng for tape in tapes.values()} == {"eager"}
        prepared = plan_held(
            PreparedPlan(plan, [tensor for _, tensor in found], tapes, None, exact), model, shown.plain
        )
    both = [
        (entry, parts.get(id(tensor), tensor))
        for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True)
    ]
    if partial:  # by this rank alone: of a model that draws, the others may have drawn something else
        both = [(e, t) for e, t in both if not isinstance(t, DTensor) or prepared.tapes[_ref(e).storage].shares_seed]
    if only is not None:
        chosen = [(entry, tensor) for entry, tensor in both if not only.isdisjoint(entry.slot.names)]
    else:
        chosen = [(entry, tensor) for entry, tensor in both if waits(tensor) or not partial]
    dtensors = {entry.slot.name: tensor for entry, tensor in chosen if isinstance(tensor, DTensor)}
    _run(chosen, prepared.tapes, ShardedTensors(dtensors, _AsItsStrategyDoes()), held, exact=exact, partial=partial)
    follow_inner(shown.wrappers())


def _is_partly_written_shard(tensor: Tensor) -> bool:
    found = recorded(local(tensor)) if isinstance(tensor, DTensor) else None
    return found is not None and found.tape.after_block.waiting.is_partly_written(found.storage)


class _AsItsStrategyDoes(WholeTensors):
    """The placement of tensors that are whole on this rank, where the strategy of their model wants them."""

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        found = recorded(tensor)
        become(tensor, value) if found is None else found.tape.after_block.put(tensor, value)
        return tensor


def _run(
    chosen: list[tuple[PlanEntry, Tensor]],
    tapes: Mapping[int, Tape],
    placement: Placement,
    held: _Held,
    *,
    exact: bool,
    partial: bool,
) -> None:
    sources = {id(tensor): held.sources(entry.slot, tapes) for entry, tensor in chosen}
    lost = [e.slot.name for e, t in chosen if sources[id(t)] is None]
    if lost and not partial:
        raise UninitializedTensorError(
            f"the model's own init computes {', '.join(lost)} from other tensors, of which this rank has to have "
            "all, with their values. Call init_missing for the whole model; or load it as well, or before setup; "
            "or declare the load: init_module(checkpoint=…)."
        )
    both = [(e, t) for e, t in chosen if sources[id(t)] is not None]
    if partial:
        both = [(e, t) for e, t in both if not never_written(tapes[_ref(e).storage], _ref(e))]
    else:
        check_all_have_values([e for e, _ in both if waits(_)], tapes, None)
    for entry, tensor in both:
        for source, _ in sources[id(tensor)] or ():
            tapes[_ref(entry).storage].after_block.waiting.filled(source.storage)
    own_init_is_wanted(tensor for _, tensor in both)
    both = [(e, t) for e, t in both if not waits(t)]
    plain = [(e, t) for e, t in both if not sources[id(t)]]
    fill(Plan(tuple(e for e, _ in plain)), [t for _, t in plain], tapes, None, placement, exact=exact)
    for entry, tensor in both:
        given = sources[id(tensor)]
        if given:
            storage = _ref(entry).storage
            device = placement.device(entry.slot)
            known = {ref.storage: as_it_is(value, ref, device) for ref, value in given}
            memory = replay_with(tapes[storage], [storage], known, exact=exact, to=all_on(device))[storage]
            with DisableTorchFunction(), torch.no_grad():
                placement.put(entry.slot, tensor, take(view(memory, _ref(entry)), placement.region(entry.slot)))


def _ref(entry: PlanEntry) -> TensorRef:
    assert entry.slot.ref is not None
    return entry.slot.ref


def recompute_from_loaded(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Record again how those of the waiting ``tensors`` are computed that the constructor computed from loaded ones.

    Args:
        model: A model that stays recorded until it is set up, some of which was loaded.
        tensors: Tensors of it that are to get their own init.
    """
    waiting = [(found, tensor) for tensor in tensors if (found := recorded(tensor)) is not None]
    loaded: dict[int, int] = {}
    for tape in {found.tape for found, _ in waiting}:
        for storage, ref in tape.after_block.waiting.refs.items():
            for now in (t for owners in tape.after_block.owners for t in owners.now(storage)):
                present = recorded(now)
                if now.shape != ref.size or not covers(tape, ref):
                    continue
                if present is None:  # another tensor has taken the place
                    constant = recorded(
                        tape.after_block.constant(now.detach().as_strided(ref.size, ref.stride).clone())
                    )
                    assert constant is not None
                    loaded[storage] = constant.storage
                elif present.storage == storage and not waits(now) and storage in tape.waits:
                    loaded[storage] = storage
    for found, tensor in waiting:
        if reads_any(found.tape, found.storage, loaded.keys()):
            instead = {storage: other for storage, other in loaded.items() if other != storage}
            recompute(found.tape, recorded_ref(tensor, found.storage), loaded.keys(), instead)


_Source = tuple[TensorRef, Tensor]


class _Held:
    """What a model holds by now where tensors were from which its constructor has computed others."""

    def __init__(self, model: nn.Module) -> None:
        self._by_name = {name: tensor for name, kind, tensor in named_tensors(model) if kind != "attribute"}
        self._ids = {id(tensor) for tensor in self._by_name.values()}
        self._candidates: dict[tuple[int, bool], dict[int, _Source | None]] = {}

    def sources(self, info: TensorInfo, tapes: Mapping[int, Tape]) -> Sequence[_Source] | None:
        """Return the tensors with values that the model's own init computes this one from.

        ``None`` where they cannot be had whole.
        """
        assert info.ref is not None
        tape = tapes[info.ref.storage]
        if not info.saved or not (tape.overruled or tape.waits):
            return ()
        copied = not any(owners.has(info.ref.storage) for owners in tape.after_block.owners)
        key = id(tape), copied
        if key not in self._candidates:
            self._candidates[key] = dict(self._with_values(tape, copied=copied))
        candidates = self._candidates[key]
        found = [candidates[s] for s in sorted(computed_from(tape, info.ref.storage, candidates, copies=False))]
        whole = [source for source in found if source is not None]
        return whole if len(whole) == len(found) else None

    def _with_values(self, tape: Tape, *, copied: bool) -> Iterator[tuple[int, _Source | None]]:
        """Yield storages that waited, with what the model holds for them; ``None`` if that has no values here."""
        for storage in (*tape.overruled, *tape.waits):
            ref = tape.after_block.waiting.refs.get(storage)
            whole = ref is not None and covers(tape, ref)
            for tensor in self._now(storage, tape, copied=copied) if whole else ():
                if is_wrapper(tensor) and local(tensor) is tensor:
                    continue  # made of it, in its place
                if local(tensor) is tensor and recorded(tensor) is None and ref and tensor.shape == ref.size:
                    yield storage, (ref, tensor.detach())
                    break
                if local(tensor) is not tensor and not waits(tensor):
                    yield storage, None  # this rank has a shard of it
                    break
            else:
                if storage in tape.overruled:
                    yield storage, None

    def _now(self, storage: int, tape: Tape, *, copied: bool) -> list[Tensor]:
        """Return what is today where a tensor on ``storage`` was; in a copy, or another module, what has its name."""
        there = [tensor for owners in tape.after_block.owners for tensor in owners.now(storage)]
        if there and not copied:
            return [tensor for tensor in there if id(tensor) in self._ids]
        tensor = self._by_name.get(tape.after_block.waiting.names.get(storage, ("", ""))[1])
        return [] if tensor is None else [tensor]
