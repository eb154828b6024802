"""Plan for a model, and execute the plan, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._gc import PausedCollector
from fabric_init._text import dtype_name
from fabric_init.checkpoints import CheckpointReader, rename_keys
from fabric_init.distributed.agreement import Agreement, SingleProcess
from fabric_init.distributed.seeds import share_seeds
from fabric_init.errors import CheckpointMismatchError, RecordingError
from fabric_init.filling.check_tied_values import check_ties
from fabric_init.filling.data_dependent import check_decisions
from fabric_init.filling.fill import fill
from fabric_init.filling.packed.on_device import refuse_own_hooks
from fabric_init.filling.packed.plan import follow_inner, pack_and_plan_held, plan_plain
from fabric_init.filling.report_rows import make_record
from fabric_init.filling.values.loads_noted import loads_noted
from fabric_init.guard.before_forward import mark_broken, release_forward
from fabric_init.guard.loads import unwatch_loads
from fabric_init.guard.waiting_tensors import release_filled, unfilled
from fabric_init.planning.derived import LoadedStorages
from fabric_init.planning.digest import plan_lines
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions
from fabric_init.planning.prepare import PreparedPlan, plan_for
from fabric_init.planning.tensors import Walk
from fabric_init.recording.tape.tape import Rng
from fabric_init.recording.tensor.wrappers import is_wrapper
from fabric_init.reports.registry import FillRecord, keep_record, statuses
from fabric_init.sharding.dtensor import ShardedTensors
from fabric_init.sharding.module_tables import putting_back, table_entries
from fabric_init.sharding.packed_weights import as_plain_model, is_packed, wraps
from fabric_init.sharding.whole import as_unsharded_model, refuse_flat_parameters, without_torchs_load_hooks

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
    wrappers: list[Tensor] = []

    def plan() -> PreparedPlan:
        refuse_flat_parameters(model)
        walk = Walk(model)
        release_filled(walk)
        refuse_own_hooks(walk, reader)
        put_back = putting_back(table_entries(walk, lambda tensor: is_wrapper(tensor) or is_packed(tensor)))
        names = () if reader is None else rename_keys(reader.keys(), wanted.rename).values()
        with without_torchs_load_hooks(walk), as_unsharded_model(walk) as shards:
            whole = Walk(model) if shards else walk
            with as_plain_model(whole, wraps, is_packed, names=set(names)) as shown:
                prepared = plan_for(shown.walk, reader, wanted, rng)
                _refuse_overwriting(prepared, whole)
                _refuse_casts(prepared, shown.apart)
            present = whole if prepared.undo is None else Walk(model)  # load code may have changed it
            prepared = pack_and_plan_held(prepared, present, placement, shown.plain)
        wrappers.extend(shown.wrappers())
        tensors = [shards.get(id(tensor), tensor) for tensor in prepared.tensors]
        sharded.update(
            (entry.slot.name, tensor)
            for entry, tensor in zip(prepared.plan.entries, tensors, strict=True)
            if isinstance(tensor, DTensor)
        )
        return prepared._replace(tensors=tensors, undo=_both(prepared.undo, put_back))

    with PausedCollector():
        prepared = agreement.run_together(_PLANNING, plan, plan_lines)
        where = ShardedTensors(sharded, placement) if sharded else placement
        try:
            share_seeds(prepared.tapes.values(), agreement)
            with loads_noted(prepared) as loaded, _partitioned(model, partition, where, agreement) as where:
                record = execute_plan(prepared, model, prepared.tensors, where, agreement, loaded)
            follow_inner(wrappers)
            return record
        except BaseException:
            if prepared.undo is not None:
                prepared.undo()
            raise


def _both(undo: Callable[[], None] | None, put_back: Callable[[], None]) -> Callable[[], None] | None:
    """Return what undoes what load code has done while other tensors were shown, and takes those out again."""

    def both() -> None:
        if undo is not None:
            undo()
            put_back()

    return both


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
        mark_broken(model)
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


def _refuse_overwriting(prepared: PreparedPlan, walk: Walk) -> None:
    """Raise if a load that is declared after the block would overwrite what the user has written since."""
    noted = statuses(walk)
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
    """Return the plan for what ``model`` holds, made on all ranks together."""
    prepared = agreement.run_together(_PLANNING, lambda: plan_plain(model, reader, wanted), plan_lines)
    with loads_noted(prepared):
        return prepared


def execute_plan(
    prepared: PreparedPlan,
    model: nn.Module,
    tensors: Sequence[Tensor],
    placement: Placement,
    agreement: Agreement = _ALONE,
    loaded: LoadedStorages | None = None,
) -> FillRecord:
    """Execute a plan on ``tensors``: its own, or those that a strategy has made of them.

    ``loaded`` are the :func:`loaded_storages` of the plan, if the caller knows them.
    """
    plan, _, tapes, reader, exact, *_ = prepared

    def check_and_fill() -> FillRecord:
        check_ties(plan, reader, placement)
        check_decisions(prepared)
        fill(plan, tensors, tapes, reader, placement, exact=exact, loaded=loaded)
        return make_record(plan, tapes, reader)

    record = agreement.run_together("filling the model", check_and_fill)
    walk = Walk(model)
    if not plan.waits and not unfilled(walk):
        unwatch_loads(walk)
        release_forward(walk)
        for tape in {tape.current() for tape in tapes.values()}:
            tape.after_block.finish(())  # what closures and caches hold
    for _, module in walk.once:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN's layout: the constructor's own call came before there was memory
    if early := statuses(walk):
        for each in record.rows:
            if each.row.status == Action.KEEP.value and each.row.name in early:
                each.update(status=early[each.row.name])
    keep_record(model, record)
    return record
