"""The log channel ``fill``: for each tensor its source, its size and the time it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Mapping

from torch import Tensor

from fabric_init import _log
from fabric_init.planning.plan import Action, Plan, PlanEntry
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.provenance import describe_rule

_logger = _log.channel("fill")


def with_log(
    values: Iterable[tuple[int, Tensor]], plan: Plan, tapes: Mapping[int, Tape]
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield ``values``, which are positions in ``plan`` and tensors, and log each if the channel is on."""
    if not _logger.isEnabledFor(logging.DEBUG):
        yield from values
        return
    start = last = time.perf_counter()
    count = nbytes = 0
    for position, value in values:
        count, nbytes, now = count + 1, nbytes + value.nbytes, time.perf_counter()
        what = f"{plan.entries[position]!r}{_rule(plan.entries[position], tapes)}"
        _logger.debug("%s; %s bytes on %s, %.4f s", what, f"{value.nbytes:,}", value.device, now - last)
        yield position, value
        last = time.perf_counter()
    _logger.debug("filled %d tensors, %s bytes, in %.3f s", count, f"{nbytes:,}", time.perf_counter() - start)


def _rule(entry: PlanEntry, tapes: Mapping[int, Tape]) -> str:
    ref = entry.slot.ref
    return f" by {describe_rule(tapes[ref.storage], ref)}" if entry.action is Action.INIT and ref is not None else ""
