"""Find the model's state dict among the dicts of a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from fabric_init._text import counted, joined
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointFormatError

WRAPPERS = ("model", "state_dict", "module")
"""Where training checkpoints keep the state dict: Fabric and most scripts, Lightning's Trainer, DeepSpeed."""

OPTIMIZER_PARTS = frozenset({"state", "param_groups"})
"""The keys of an optimizer's state dict; its tensors are not weights."""

EXTRA_STATE = "_extra_state"
"""Suffix of the keys of ``nn.Module.get_extra_state``; tensors in it are not weights either."""

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""What torch's ``checkpoint_wrapper`` inserts into the names of parameters, and takes out of those of a state dict."""

Location = tuple[str, ...]
"""The keys that lead from what was saved to a dict in it; ``()`` is the outermost dict."""


def choose_state_dict(path: AnyPath, counts: Mapping[Location, int], entry: str | None) -> Location:
    """Return the location of the model's state dict.

    Asked for by ``entry`` (keys joined by dots), or else: what is under a usual name, the least deep; what lies at the
    outermost level; the only one there is.

    Args:
        path: of the checkpoint, for errors.
        counts: how many tensors lie directly in the dict at each location, those of optimizers left out.
        entry: the state dict that the user names.

    Raises:
        CheckpointFormatError: there is none, or several could be meant; the message names them.
    """
    if entry is not None:
        for location in counts:
            if ".".join(location) == entry:
                return location
        raise CheckpointFormatError(f"{path} has no state dict {entry!r}. There are tensors under {_named(counts)}.")
    usual = [location for location in counts if location and location[-1] in WRAPPERS]
    usual = [location for location in usual if len(location) == min(map(len, usual))]
    if not usual and () in counts:
        return ()
    candidates = usual or list(counts)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        named = _named({location: counts[location] for location in candidates})
        raise CheckpointFormatError(
            f"{path} holds {len(candidates)} state dicts: {named}. Name the one you mean, for example "
            f"entry={'.'.join(candidates[0])!r}."
        )
    raise CheckpointFormatError(
        f"{path} holds no tensor at the top level, nor in a dict in it, other than the state of optimizers. Is it the "
        f"right file? It should be what model.state_dict() returned, or a dict that holds it under 'model'."
    )


def describe(location: Location) -> str | None:
    """Return a note for the user if the state dict was not the outermost dict."""
    return f"state dict found under {'.'.join(location)!r}" if location else None


def _named(counts: Mapping[Location, int]) -> str:
    names = [f"{'.'.join(location)!r} ({counted(count, 'tensor')})" for location, count in counts.items()]
    return joined(names) or "no name at all"
