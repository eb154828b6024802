"""Make a plan and validate it: the mistakes of users are raised here, before a weight is read or memory allocated."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fabric_init import _log
from fabric_init._text import counted, listed
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError, UninitializedTensorError
from fabric_init.planning.loading.recorded_load import RecordedLoad
from fabric_init.planning.matching import Matching, likely_fixes, likely_transpose, match
from fabric_init.planning.plan import Action, LoadOptions, Plan, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.liveness import never_written
from fabric_init.recording.tape import Tape

_logger = _log.channel("plan")


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
    if reader is not None:
        if matching.lacks_some or matching.unexpected:
            nothing_matches = matching.lacks_some and not matching.taken
            if options.strict or nothing_matches:
                raise CheckpointMismatchError(_keys_message(matching, reader))
        if matching.misfits:
            transpose = likely_transpose(matching, reader)
            raise CheckpointMismatchError(
                f"{reader.path}: {len(matching.misfits)} of {matching.loadable} tensors do not fit the model:\n"
                + listed([misfit.problem for misfit in matching.misfits])
                + ("" if transpose is None else f"\nLikely: {transpose}")
                + "\nBuild the model from the checkpoint's own config, or have these tensors initialized instead, "
                'e.g. reinit=["' + matching.misfits[0].slot.name + '"].'
            )
    check_all_have_values(matching.entries, tapes, reader)
    plan = Plan(matching.entries, matching.unexpected)
    if _logger.isEnabledFor(logging.DEBUG):
        source = "no checkpoint" if reader is None else f"checkpoint {reader.path} ({reader.format})"
        _logger.debug("%s; %s", plan.summary(), source)
    return plan


def without_values(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> tuple[list[str], list[str]]:
    """Return the names of tensors to initialize that have no init: not recorded, and never written by the model."""
    unrecorded, unwritten = [], []
    for slot, action, *_ in entries:
        if action is Action.INIT:
            if slot.ref is None:
                unrecorded.append(slot.name)
            elif never_written(tapes[slot.ref.storage], slot.ref):
                unwritten.append(slot.name)
    return unrecorded, unwritten


def check_all_have_values(
    entries: Sequence[PlanEntry], tapes: Mapping[int, Tape], reader: CheckpointReader | None
) -> None:
    """Check that every tensor gets a value from the checkpoint or the model's own code.

    Raises:
        UninitializedTensorError: Some do not; the message names them.
    """
    unrecorded, unwritten = without_values(entries, tapes)
    if not unrecorded and not unwritten:
        return
    parts = []
    if unwritten:
        parts.append(
            f"the model's own code never gives {counted(len(unwritten), 'tensor')} a value (torch.empty, no init):\n"
            + listed(unwritten)
        )
    if unrecorded:
        parts.append(
            f"{len(unrecorded)} tensors are on the meta device but were not recorded, so there is no init to run:\n"
            + listed(unrecorded)
        )
    where = f"{reader.path} does not hold them" if reader is not None else "no checkpoint was given"
    raise UninitializedTensorError(
        "; ".join(parts) + f"\nand {where}. Initialize them in the model's constructor (inside the block), or load a "
        "checkpoint that has them."
    )


def _keys_message(matching: Matching, reader: CheckpointReader) -> str:
    saved = sum(entry.slot.saved for entry in matching.entries)
    lines = [f"{reader.path}: {matching.loadable} of {saved} tensors match."]
    if reader.note:
        lines.append(f"({reader.note}.)")
    if matching.lacks_some:
        names = [*(slot.name for slot in matching.missing), *matching.missing_extras]
        lines.append(f"Missing from the checkpoint ({len(names)}):\n" + listed(names, most=None))
    if matching.unexpected:
        lines.append(f"Not in the model ({len(matching.unexpected)}):\n" + listed(matching.unexpected, most=None))
    fixes = likely_fixes(matching, reader)
    lines += [f"Likely: {fix}" for fix in fixes]
    if not fixes:
        if not matching.loadable:
            lines.append("This looks like a checkpoint of another model.")
        else:
            lines.append(
                "strict=False gives missing tensors the model's own init and ignores extra keys; rename= maps keys."
            )
    return "\n".join(lines)
