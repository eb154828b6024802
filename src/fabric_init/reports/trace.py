"""Read from a recording how tensors got their values, and measure what is in memory now.

Both happen on request: filling a model does none of this work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init._text import dtype_name
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints.state_dicts import CHECKPOINT_WRAPPER
from fabric_init.planning.tensors import TensorInfo, named_tensors
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.expectations import Expectations
from fabric_init.reports.provenance import file_of, rule_of_history, write_of
from fabric_init.reports.rows import InitRow, Recording, TensorTrace
from fabric_init.reports.statistics import Moments, measured
from fabric_init.reports.write_history import Event, History, histories

_MOST_KEPT = 1 << 24
"""Bytes of real values on a tape that a report may keep from being freed."""

_WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", CHECKPOINT_WRAPPER, "_orig_mod.")


def keeps_much(tape: Tape) -> bool:
    """Return whether a tape holds too many values that a constructor brought in to be kept for a report."""
    return tape.constant_bytes > _MOST_KEPT


def recording_of(slot: TensorInfo, tape: Tape) -> Recording | None:
    """Return the recording for a row, or ``None`` if it is not to be kept."""
    return None if keeps_much(tape) else Recording(slot, tape)


class Traced(NamedTuple):
    """The trace of one history, and its dead writes that no earlier history has counted."""

    trace: TensorTrace
    dead: tuple[Event, ...]


class Tracer:
    """Trace histories of one model: expectations of equal rules are shared, and each dead write is counted once."""

    def __init__(self) -> None:
        self._expectations: dict[Tape, Expectations] = {}
        self._counted: set[int] = set()

    def expectations(self, tape: Tape) -> Expectations:
        """Return the expectations of ``tape``."""
        return self._expectations.setdefault(tape, Expectations(tape))

    def trace(self, history: History, *, run: bool = False) -> Traced:
        """Trace one history.

        Args:
            history: of a tensor of the model.
            run: replay a small tensor to measure its moments if they cannot be derived from the ops.
        """
        slot, winner = history.slot, history.winner
        dead = tuple(event for event in history.events if event.dead and event.op.number not in self._counted)
        self._counted.update(event.op.number for event in dead)
        source = None if winner is None else winner.source
        expected = self._expected(history, run=run)
        trace = TensorTrace(
            name=slot.name,
            shape=tuple(slot.shape),
            dtype=dtype_name(slot.dtype),
            kind=slot.kind,
            ties=slot.names[1:],
            rule=rule_of_history(history),
            file=file_of(source),
            line=None if source is None else source.line,
            mean=None if expected is None else expected.mean,
            std=None if expected is None else expected.std,
            writes=tuple(map(write_of, history.events)),
            full_writes=sum(event.whole for event in history.events),
            wasted_elements=sum(event.ref.size.numel() for event in dead),
        )
        return Traced(trace, dead)

    def _expected(self, history: History, *, run: bool) -> Moments | None:
        ref, tape = history.slot.ref, history.tape
        if ref is None or tape is None or history.never_written:
            return None
        expectations = self.expectations(tape)
        return expectations.of(ref) if run else expectations.of_rules(ref)


def trace_rows(rows: Sequence[InitRow]) -> tuple[InitRow, ...]:
    """Return ``rows`` with what their recordings tell; rows without one stay as they are."""
    recordings = [row.recording for row in rows if row.recording is not None and row.kind != "attribute"]
    tapes = {each.slot.ref.storage: each.tape.current() for each in recordings if each.slot.ref is not None}
    traced = iter(histories([each.slot for each in recordings], tapes))
    tracer = Tracer()
    return tuple(
        row if row.recording is None or row.kind == "attribute" else _with_trace(row, tracer.trace(next(traced)).trace)
        for row in rows
    )


def _with_trace(row: InitRow, trace: TensorTrace) -> InitRow:
    row = replace(row, writes=trace.writes, full_writes=trace.full_writes, wasted_elements=trace.wasted_elements)
    if row.status not in ("initialized", "unfilled"):
        return replace(row, rule="", file=None, line=None, mean=None, std=None)  # the value has another origin
    return replace(row, rule=trace.rule, file=trace.file, line=trace.line, mean=trace.mean, std=trace.std)


def measure_rows(rows: Sequence[InitRow], model: nn.Module) -> tuple[InitRow, ...]:
    """Return ``rows`` with the moments of what ``model`` holds in the memory of this process now."""
    local: dict[str, Tensor] = {}
    with DisableTorchFunction():
        for name, _, tensor in named_tensors(model):
            for prefix in _WRAPPER_PREFIXES:
                name = name.replace(prefix, "")
            local.setdefault(name, tensor)
    return tuple(_measure_row(row, local.get(row.name)) for row in rows)


def _measure_row(row: InitRow, tensor: Tensor | None) -> InitRow:
    moments = None
    if tensor is not None and row.status != "unfilled":
        with torch.no_grad():
            moments = measured(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    mean, std = (None, None) if moments is None else moments
    return replace(row, mean_now=mean, std_now=std)
