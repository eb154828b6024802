"""Execute a plan a few tensors at a time, for strategies that shard a model while they go through it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fabric_init.filling.execute import check_ties, fill, note_of
from fabric_init.filling.looked_at import check_decisions
from fabric_init.planning.derived import loaded_storages
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Plan, storage_groups
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.reports.registry import FillRecord, RowRecord


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
        self._rows: dict[int, RowRecord] = {}

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
        plan, _, _, reader, _, *_ = self._prepared
        self._fill(range(len(plan.entries)))
        rows = [row for _, row in sorted(self._rows.items())]
        path = None if reader is None else str(reader.path)
        return FillRecord(rows, path, note_of(plan, reader), plan.unexpected)

    def _fill(self, positions: Iterable[int]) -> None:
        plan, tensors, tapes, reader, exact, *_ = self._prepared
        wanted = {other for position in positions for other in self._together.get(position, (position,))}
        now = sorted(wanted - self._rows.keys())
        if now:
            part = Plan(tuple(plan.entries[position] for position in now))
            these: list[Tensor] = [tensors[position] for position in now]
            record = fill(part, these, tapes, reader, self._placement, exact=exact, loaded=self._loaded)
            self._rows.update(zip(now, record.rows, strict=True))
