"""Whether a load can be as it was asked for; every error that a user can make is raised here.

That is before a weight is read or memory is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fabric_init import _log
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError, UninitializedTensorError
from fabric_init.planning.extra_state import ExtraStateInfo
from fabric_init.planning.matching import Matching, likely_fixes, likely_transpose, match
from fabric_init.planning.plan import Action, LoadOptions, Plan, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape import Tape

_logger = _log.channel("plan")


def make_plan(
    slots: Sequence[TensorInfo],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    wanted: LoadOptions,
    extra_infos: Sequence[ExtraStateInfo] = (),
) -> Plan:
    """Decide for each tensor: load this key, run the model's own init, or keep what it has.

    Args:
        slots: the model's tensors.
        tapes: the tape of each recorded storage among them.
        reader: the checkpoint, of which only the header is asked; ``None`` to initialize everything.
        wanted: ``strict``, ``rename`` and ``reinit``.
        extra_slots: the model's modules that take extra state.

    Raises:
        CheckpointMismatchError: missing, unexpected or mismatched keys.
        UninitializedTensorError: a tensor that neither the checkpoint nor the model's own code gives a value.
    """
    found = match(slots, tapes, reader, wanted, extra_infos)
    if reader is not None:
        if found.lacks_some or found.unexpected:
            nothing_matches = found.lacks_some and not found.taken
            if wanted.strict or nothing_matches:
                raise CheckpointMismatchError(_keys_message(found, reader))
        if found.misfits:
            transpose = likely_transpose(found, reader)
            raise CheckpointMismatchError(
                f"{reader.path}: {len(found.misfits)} of {found.loadable} tensors do not fit the model:\n"
                + _listed([misfit.problem for misfit in found.misfits])
                + ("" if transpose is None else f"\nLikely: {transpose}")
                + "\nBuild the model from the checkpoint's own config, or name what is to be initialized afresh "
                'instead, e.g. reinit=["' + found.misfits[0].slot.name + '"].'
            )
    check_all_have_values(found.entries, tapes, reader)
    plan = Plan(found.entries, found.unexpected, found.extras)
    if _logger.isEnabledFor(logging.DEBUG):
        source = "no checkpoint" if reader is None else f"checkpoint {reader.path} ({reader.format})"
        _logger.debug("%s; %s", plan.summary(), source)
    return plan


def without_values(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> tuple[list[str], list[str]]:
    """Names of tensors to initialize for which there is no init: not recorded at all; never written by the model."""
    outside, garbage = [], []
    for slot, action, *_ in entries:
        if action is Action.INIT:
            if slot.ref is None:
                outside.append(slot.name)
            elif tapes[slot.ref.storage].never_written(slot.ref):
                garbage.append(slot.name)
    return outside, garbage


def check_all_have_values(
    entries: Sequence[PlanEntry], tapes: Mapping[int, Tape], reader: CheckpointReader | None
) -> None:
    """Raise if neither a checkpoint nor the model's own code gives some tensor a value.

    Raises:
        UninitializedTensorError: naming all of them.
    """
    outside, garbage = without_values(entries, tapes)
    if not outside and not garbage:
        return
    parts = []
    if garbage:
        parts.append(
            f"the model's own code never gives {len(garbage)} tensors a value (torch.empty and no init), so they would "
            "be garbage:\n" + _listed(garbage)
        )
    if outside:
        parts.append(
            f"{len(outside)} tensors are on the meta device but were not recorded, so there is no init to run:\n"
            + _listed(outside)
        )
    where = f"{reader.path} does not hold them" if reader is not None else "no checkpoint brings them"
    raise UninitializedTensorError(
        "; ".join(parts) + f"\nand {where}. Initialize them in the model's constructor (inside the block), or load a "
        "checkpoint that has them."
    )


def _keys_message(found: Matching, reader: CheckpointReader) -> str:
    saved = sum(entry.slot.saved for entry in found.entries)
    lines = [f"{reader.path}: {found.loadable} of {saved} tensors match."]
    if reader.note:
        lines.append(f"({reader.note}.)")
    if found.lacks_some:
        names = [*(slot.name for slot in found.missing), *found.missing_extras]
        lines.append(f"Missing from the checkpoint ({len(names)}):\n" + _listed(names))
    if found.unexpected:
        lines.append(f"Not in the model ({len(found.unexpected)}):\n" + _listed(found.unexpected))
    hints = likely_fixes(found, reader)
    lines += [f"Likely: {hint}" for hint in hints]
    if not hints:
        if not found.loadable:
            lines.append("This looks like a checkpoint of another model.")
        else:
            lines.append(
                "strict=False gives missing tensors the model's own init and ignores the rest; rename= maps keys."
            )
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return "\n".join(f"  {name}" for name in names)
