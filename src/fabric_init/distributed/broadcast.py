"""Read each tensor of a checkpoint once, on rank 0, and broadcast it: for slow storage that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader, Region, Span, TensorSpec
from fabric_init.checkpoints.reader import BaseReader, fields_of, metadata_of, read
from fabric_init.checkpoints.region import copy_part
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.distributed.agreement import Agreement
from fabric_init.distributed.broadcast_buffers import ALIGNMENT, aligned, batches, chunks
from fabric_init.distributed.checked_broadcast import CheckedBroadcast
from fabric_init.planning.checks.ties import check_tie
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, Plan
from fabric_init.planning.rank_loads import Load, loads

_READ_AT_ONCE = 1 << 20  # bytes; what is larger and freed between tensors that stay leaves holes in the heap


class _Header(NamedTuple):
    """The header of a checkpoint, as rank 0 sends it to the others."""

    path: AnyPath
    format: str
    note: str | None
    specs: dict[str, TensorSpec]
    extra_state: dict[str, Any]
    metadata: Any
    fields: dict[str, Any]


class BroadcastReader(BaseReader):
    """A checkpoint that is open on rank 0, and of which the other ranks have the header.

    A :class:`~fabric_init.checkpoints.reader.CheckpointReader`, but for one thing: ``read`` and ``load`` are for all
    ranks of torch's default process group to call together, with the same keys in the same order. Regions may differ.

    Args:
        header: The header, the same on every rank.
        reader: The checkpoint itself, on rank 0.
        budget: The bytes that a rank holds beside its regions while reading. A larger tensor is sent in pieces, smaller
            ones together.
    """

    collective = True

    def __init__(self, header: _Header, reader: CheckpointReader | None, budget: int) -> None:
        assert budget >= 2 * ALIGNMENT
        self.path, self.format, self.note, self.specs, self.extra_state, self.metadata, self.fields = header
        self._reader = reader
        self._budget = budget

    @classmethod
    def open(cls, make: Callable[[], CheckpointReader], agreement: Agreement, budget: int) -> BroadcastReader:
        """Open the reader with ``make`` on rank 0, and send its header to the other ranks."""

        def on_rank_zero() -> tuple[CheckpointReader, _Header] | None:
            if dist.get_rank():
                return None
            reader = make()
            specs = {key: reader.spec(key) for key in reader.keys()}
            return reader, _Header(
                reader.path,
                reader.format,
                reader.note,
                specs,
                dict(reader.extra_state),
                metadata_of(reader),
                dict(fields_of(reader)),
            )

        opened = agreement.run_together("opening the checkpoint", on_rank_zero)
        reader, header = opened if opened is not None else (None, None)
        return cls(agreement.from_rank_zero(header), reader, budget)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Return a tensor or a region of it, on the CPU, in memory of its own. Raises as :meth:`load` does."""
        spec = self.spec(key)
        target = _Target(region, _sizes(spec.shape, region), None, spec.dtype, torch.device("cpu"))
        [(_, value)] = self._share([key], [spec], lambda: [target], lambda index, part, values: None)
        return value

    def check_ties(self, plan: Plan, placement: Placement) -> None:
        """Do nothing: :meth:`load` checks ties on rank 0, so that no tensor is read twice."""

    def load(self, plan: Plan, placement: Placement) -> Iterator[tuple[int, Tensor]]:
        """Yield positions in the plan and the values that this rank keeps for them.

        Args:
            plan: The same plan on every rank.
            placement: How this rank keeps the tensors.

        Raises:
            CheckpointError: On rank 0, if it cannot read on.
            CheckpointMismatchError: On rank 0, if a tied tensor has different values under its keys.
            RanksLostError: A rank is gone.
            FabricInitError: Another rank failed; its message is included.
        """
        in_file = {key: index for index, key in enumerate(self.specs)}
        entries = [(position, entry) for position, entry in enumerate(plan.entries) if entry.action is Action.LOAD]
        if not entries:
            return  # a strategy that fills unit by unit may have units without loads
        entries.sort(key=lambda item: in_file[item[1].keys[0]])  # slow storage is read fastest from front to back

        def targets() -> list[_Target]:
            wanted = {load.position: _target(load) for load in loads(plan, placement)}
            return [wanted[position] for position, _ in entries]

        def check_ties(index: int, part: Span, values: Tensor) -> None:
            assert self._reader is not None
            entry = entries[index][1]
            for key in entry.keys[1:]:
                check_tie(self.path, entry, key, values, read(self._reader, key, part))

        keys = [entry.keys[0] for _, entry in entries]
        # A scalar is sent as one, however many dimensions it was saved with.
        specs = [replace(self.spec(key), shape=entry.slot.shape) for key, (_, entry) in zip(keys, entries, strict=True)]
        for index, value in self._share(keys, specs, targets, check_ties):
            yield entries[index][0], value

    def _share(
        self,
        keys: Sequence[str],
        specs: Sequence[TensorSpec],
        targets: Callable[[], Sequence[_Target]],
        check: Callable[[int, Span, Tensor], None],
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the index in ``keys`` and this rank's part of that tensor, for all ``keys``.

        Args:
            keys: The same keys on every rank.
            specs: Their dtypes in the checkpoint, and their shapes.
            targets: Returns this rank's part of each tensor.
            check: Called on rank 0 with what has been read: index in ``keys``, elements of that tensor, their values.
        """
        chunk = max(ALIGNMENT, min(_READ_AT_ONCE, self._budget // 16))
        capacity = (self._budget - chunk) // ALIGNMENT * ALIGNMENT
        capacity = min(capacity, sum(aligned(spec.shape.numel() * spec.dtype.itemsize) for spec in specs))
        begun: dict[int, Tensor] = {}
        with CheckedBroadcast(f"reading {self.path}") as ranks:
            with ranks.mine():
                wanted = targets()
                buffer = torch.empty(capacity, dtype=torch.uint8, device=ranks.device)
            ranks.roll_call()
            for batch in batches(specs, capacity):
                parts = [buffer[piece.offset : piece.end].view(piece.dtype) for piece in batch]
                with ranks.mine():
                    if self._reader is not None:
                        for piece, part in zip(batch, parts, strict=True):
                            for span in chunks(piece, chunk):
                                values = read(self._reader, keys[piece.tensor], span)
                                check(piece.tensor, span, values)
                                part[span.start - piece.start : span.stop - piece.start].copy_(values)
                ranks.roll_call()
                ranks.broadcast(buffer[: batch[-1].end])
                done = []
                with ranks.mine():
                    for piece, part in zip(batch, parts, strict=True):
                        target = wanted[piece.tensor]
                        value = begun.pop(piece.tensor) if piece.start else target.allocate()
                        copy_part(part, piece.start, specs[piece.tensor].shape, target.region, value)
                        if piece.is_last:
                            done.append((piece.tensor, value))
                        else:
                            begun[piece.tensor] = value
                yield from done
            ranks.roll_call()


class _Target(NamedTuple):
    """A rank's part of a tensor, and its memory layout; ``stride`` is ``None`` for row-major."""

    region: Region | None
    sizes: tuple[int, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device

    def allocate(self) -> Tensor:
        if self.stride is None:
            return torch.empty(self.sizes, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.sizes, self.stride, dtype=self.dtype, device=self.device)


def _target(load: Load) -> _Target:
    slot = load.entry.slot
    ref = slot.ref if load.region is None else None
    stride = ref.stride if ref is not None and not ref.expanded else None
    return _Target(load.region, _sizes(slot.shape, load.region), stride, slot.dtype, load.device)


def _sizes(shape: torch.Size, region: Region | None) -> tuple[int, ...]:
    if isinstance(region, Span):
        return (region.numel,)
    return shape if region is None else region.sizes
