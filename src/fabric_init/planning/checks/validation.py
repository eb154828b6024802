"""Validate a plan: the mistakes of users become errors here, before a weight is read or memory allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fabric_init._text import counted, listed
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import UninitializedTensorError
from fabric_init.planning.hints.proposals import likely_transpose, proposals
from fabric_init.planning.hints.quantized import quantized_message, unknown_scheme, unscaled
from fabric_init.planning.hints.strict_false_mistakes import hidden_mistake, in_part
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action, PlanEntry
from fabric_init.recording.tape.liveness import never_written
from fabric_init.recording.tape.tape import Tape


def refusal_of(matching: Matching, reader: CheckpointReader) -> str | None:
    """Return why a checkpoint is refused, with what would fix it; ``None`` if it is not.

    Whether every tensor gets a value is checked apart.
    """
    quantized = unscaled(matching, reader)
    if quantized:
        return quantized_message(quantized, matching, reader)
    nothing_matches = matching.lacks_some and not matching.taken
    if matching.options.strict or nothing_matches:
        if matching.lacks_some or matching.unexpected:
            return _keys_message(matching, reader)
    elif matching.lacks_some:
        hidden = unknown_scheme(matching, reader) or hidden_mistake(matching, reader)
        if hidden is not None:
            return hidden
    return _misfits_message(matching, reader) if matching.misfits else None


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


def _misfits_message(matching: Matching, reader: CheckpointReader) -> str:
    transpose = likely_transpose(matching, reader)
    lines = [
        f"{reader.path}: {len(matching.misfits)} of {matching.loadable} tensors do not fit the model:",
        listed([misfit.problem for misfit in matching.misfits]),
    ]
    if transpose is not None:
        lines.append(transpose.line())
    if transpose is None or not transpose.whole:
        lines.append(f"Build the model from the checkpoint's own config{_reinit_instead(matching, reader)}.")
    return "\n".join(lines)


def _reinit_instead(matching: Matching, reader: CheckpointReader) -> str:
    """Return how to initialize the tensors that do not fit, with every name of one that is tied."""
    names = ", ".join(f'"{name}"' for name in matching.misfits[0].slot.names)
    return f", or have these tensors initialized instead, e.g. reinit=[{names}]"


def parts_loaded(matching: Matching) -> list[str]:
    """Return a line for each module of which the checkpoint brings some tensors and lacks others."""
    return in_part(matching.entries, (slot.name for slot in matching.missing)) if matching.loadable else []


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
    found = proposals(matching, reader)
    parts = [] if found.likely else parts_loaded(matching)
    if parts:
        lines.append(f"Loaded in part ({len(parts)}):\n" + listed(parts))
    lines += [*found.lines(), *found.notes()]
    if found.likely:
        return "\n".join(lines)
    if not matching.loadable and not found.ambiguous:
        lines.append("This looks like a checkpoint of another model.")
    elif matching.loadable and hidden_mistake(matching, reader) is not None:
        lines.append(
            "In the same modules the checkpoint lacks tensors and has keys that no tensor takes: say with convert= or "
            "rename= how the one becomes the other. reinit= gives tensors the model's own init."
        )
    elif matching.loadable:
        lines.append(
            "strict=False gives missing tensors the model's own init and ignores extra keys; rename= maps keys."
        )
    return "\n".join(lines)
