"""Execute a plan a few tensors at a time, for strategies that shard a model while they go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.distributed.agreement import Agreement
from fabric_init.distributed.seeds import share_seeds
from fabric_init.filling.check_tied_values import check_ties
from fabric_init.filling.data_dependent import check_decisions
from fabric_init.filling.fill import fill
from fabric_init.filling.packed.plan import pack_and_plan_held, plan_plain
from fabric_init.filling.report_rows import make_record
from fabric_init.filling.values.loads_noted import loads_noted
from fabric_init.guard.before_forward import release_forward
from fabric_init.guard.loads import unwatch_loads
from fabric_init.guard.waiting_tensors import release_filled
from fabric_init.planning.derived import loaded_storages
from fabric_init.planning.digest import sharded_lines
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.plan import LoadOptions, Plan, storage_groups
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import Walk
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, become, become_recorded
from fabric_init.reports.registry import FillRecord, keep_record


class IncrementalFill:
    """A plan of which each part is executed when the strategy comes to it.

    Order of calls: ``begin``, then ``fill_under`` any number of times, then ``finish``.
    """

    def __init__(self, prepared: PreparedPlan, placement: Placement) -> None:
        self._prepared = prepared
        self._placement = placement
        self._position = {id(tensor): position for position, tensor in enumerate(prepared.tensors)}
        # Tensors on one storage are filled at once: values that are loaded into one are seen in the others.
        self._together = {
            position: group for group in storage_groups(prepared.plan.entries).values() for position in group
        }
        self._loaded = loaded_storages(prepared.plan, prepared.tapes)
        self._filled: set[int] = set()

    def begin(self) -> None:
        """Check what takes values to check, and fill what has memory already."""
        plan, _, _, reader, _, *_ = self._prepared
        check_ties(plan, reader, self._placement)
        check_decisions(self._prepared)
        self._fill(position for position, entry in enumerate(plan.entries) if entry.slot.ref is None)

    def fill_under(self, module: nn.Module) -> None:
        """Fill the parameters and buffers under ``module`` that are not filled yet."""
        self._fill(
            position
            for part in module.modules()
            for tensor in (*part._parameters.values(), *part._buffers.values())
            if (position := self._position.get(id(tensor))) is not None
        )

    def finish(self) -> FillRecord:
        """Fill all remaining tensors, and return the rows of the report."""
        plan, _, tapes, reader, _, *_ = self._prepared
        self._fill(range(len(plan.entries)))
        return make_record(plan, tapes, reader)

    def _fill(self, positions: Iterable[int]) -> None:
        plan, tensors, tapes, reader, exact, *_ = self._prepared
        wanted = {other for position in positions for other in self._together.get(position, (position,))}
        now = sorted(wanted - self._filled)
        if now:
            part = Plan(tuple(plan.entries[position] for position in now))
            these: list[Tensor] = [tensors[position] for position in now]
            fill(part, these, tapes, reader, self._placement, exact=exact, loaded=self._loaded)
            self._filled.update(now)


@contextmanager
def plain_meta(prepared: PreparedPlan) -> Iterator[None]:
    """Context in which the recorded tensors of a plan are plain meta tensors, which FSDP asks to be filled.

    If it fails, those that are left in the model are recorded tensors again.
    """
    recordings = [
        (tensor, tensor._meta, tensor._claimed)
        for entry, tensor in zip(prepared.plan.entries, prepared.tensors, strict=True)
        if isinstance(tensor, RecordedTensor) and not entry.on_use
    ]
    with DisableTorchFunction(), torch.no_grad():
        for tensor, meta, _ in recordings:
            become(tensor, meta.detach(), alone=True)
    try:
        yield
    except BaseException:
        with DisableTorchFunction(), torch.no_grad():
            for tensor, meta, device in recordings:
                if tensor.is_meta:
                    become_recorded(tensor, meta, device)
        raise


@contextmanager
def filled_by_module(
    model: nn.Module, reader: CheckpointReader | None, wanted: LoadOptions, agreement: Agreement
) -> Iterator[Callable[[nn.Module], None]]:
    """Context in which what it yields fills all tensors under a module of the recorded ``model``; the rest at its end.

    If it fails before anything is filled, the modules are as they were, and can be filled anew.

    Raises:
        FabricInitError: Anything that the user has to fix, on all ranks.
    """

    def plan() -> PreparedPlan:
        walk = Walk(model)
        release_filled(walk)
        prepared = plan_plain(walk, reader, wanted)
        return pack_and_plan_held(prepared, walk if prepared.undo is None else model, WholeTensors())

    prepared = agreement.run_together("planning the initialization", plan, sharded_lines)
    filling, begun = IncrementalFill(prepared, WholeTensors()), False
    try:
        share_seeds(prepared.tapes.values(), agreement)
        with loads_noted(prepared), plain_meta(prepared):
            filling.begin()
            begun = True
            yield filling.fill_under
            record = agreement.run_together("filling the model", filling.finish)
    except BaseException:
        if not begun and prepared.undo is not None:  # later, parts of the model are FSDP's
            prepared.undo()
        raise
    unwatch_loads(model)
    release_forward(model)
    keep_record(model, record)
