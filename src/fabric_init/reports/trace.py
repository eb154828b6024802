"""What the rows of a report tell on request: what the recording knows of each tensor, and what is in memory now.

Nothing of this is worked out when a model is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init.planning.tensors import TensorInfo, named_tensors
from fabric_init.recording.tape import Tape
from fabric_init.reports.expectations import Expectations
from fabric_init.reports.provenance import file_of, rule_said, write_of
from fabric_init.reports.rows import Recording
from fabric_init.reports.statistics import measured
from fabric_init.reports.write_history import History, histories

if TYPE_CHECKING:
    from fabric_init.reports.rows import Row

_MOST_KEPT = 1 << 24
"""Bytes of real values on a tape that a report may keep from being freed."""

_OF_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def recording_of(slot: TensorInfo, tape: Tape) -> Recording | None:
    """What a row keeps. ``None`` where the constructor brought in much memory of its own, which the tape holds."""
    return None if tape.brought > _MOST_KEPT else Recording(slot, tape)


def trace(rows: Sequence[Row]) -> None:
    """Give ``rows`` what their recording tells."""
    known = [(row, row.recording) for row in rows if row.recording is not None and row.kind != "attribute"]
    tapes = {kept.slot.ref.storage: kept.tape.current() for _, kept in known if kept.slot.ref is not None}
    expectations = {tape: Expectations(tape) for tape in tapes.values()}
    counted: set[int] = set()
    for (row, _), history in zip(known, histories([kept.slot for _, kept in known], tapes), strict=True):
        row.writes = tuple(map(write_of, history.events))
        row.full_writes = sum(event.whole for event in history.events)
        dead = [event for event in history.events if event.dead and event.op.number not in counted]
        counted.update(event.op.number for event in dead)
        row.wasted_elements = sum(event.ref.size.numel() for event in dead)
        row.rule, row.file, row.line, row.mean, row.std = "", None, None, None, None
        if row.status in ("initialized", "unfilled"):
            _explain(row, history, expectations)


def _explain(row: Row, history: History, expectations: dict[Tape, Expectations]) -> None:
    ref, tape = history.slot.ref, history.tape
    if ref is None or tape is None or history.winner is None:
        return
    source = history.winner.source
    row.rule = rule_said(history)
    row.file, row.line = file_of(source), None if source is None else source.line
    expected = None if tape.never_written(ref) else expectations[tape].of_rules(ref)
    if expected is not None:
        row.mean, row.std = expected


def measure(rows: Sequence[Row], model: nn.Module) -> None:
    """Give ``rows`` the moments of what ``model`` holds in this process's memory now."""
    held: dict[str, Tensor] = {}
    with torch._C.DisableTorchFunction():
        for name, _, tensor in named_tensors(model):
            for wrapper in _OF_WRAPPERS:
                name = name.replace(wrapper, "")
            held.setdefault(name, tensor)
    for row in rows:
        here = held.get(row.name)
        found = None
        if here is not None and row.status != "unfilled":
            with torch.no_grad():
                found = measured(here.to_local() if isinstance(here, DTensor) else here)
        row.mean_now, row.std_now = (None, None) if found is None else found
