"""Make the plan of a load: match the model's tensors with the checkpoint's keys, and validate what results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fabric_init import _log
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.checks.validation import check_all_have_values, parts_loaded, refusal_of
from fabric_init.planning.matching import match
from fabric_init.planning.plan import LoadOptions, Plan
from fabric_init.planning.recorded_load.record import RecordedLoad
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.tape import Tape

_logger = _log.channel("plan")
_MOST_PARTS = 5


def make_plan(
    slots: Sequence[TensorInfo],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    options: LoadOptions,
    load: RecordedLoad | None = None,
) -> Plan:
    """Decide for each tensor whether to load a key, run the model's own init, or keep its value.

    Args:
        slots: The model's tensors.
        tapes: The tape of each recorded storage among them.
        reader: The checkpoint, of which only the header is read; ``None`` to initialize everything.
        options: ``strict``, ``rename`` and ``reinit``.
        load: What the load code of the model has made of the checkpoint, if it has any.

    Raises:
        CheckpointMismatchError: Keys are missing or unexpected, or shapes or dtypes differ.
        OptionError: ``rename`` is invalid, or ``reinit`` matches no tensor.
        UninitializedTensorError: Neither the checkpoint nor the model's own code gives some tensor a value.
    """
    matching = match(slots, tapes, reader, options, load)
    notes: tuple[str, ...] = ()
    if reader is not None:
        refusal = refusal_of(matching, reader)
        if refusal is not None:
            raise CheckpointMismatchError(refusal)
        parts = parts_loaded(matching)
        if parts:
            more = f"; … and {len(parts) - _MOST_PARTS:,} more" if len(parts) > _MOST_PARTS else ""
            notes = (f"loaded in part: {'; '.join(parts[:_MOST_PARTS])}{more}",)
    check_all_have_values(matching.entries, tapes, reader)
    plan = Plan(matching.entries, matching.unexpected, notes=notes)
    if _logger.isEnabledFor(logging.DEBUG):
        source = "no checkpoint" if reader is None else f"checkpoint {reader.path} ({reader.format})"
        _logger.debug("%s; %s", plan.summary(), source)
    for note in notes:
        _logger.warning("%s: %s", None if reader is None else reader.path, note)
    return plan
