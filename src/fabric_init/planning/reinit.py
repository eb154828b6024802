"""The tensors that ``reinit=`` names: they get the model's own init although the checkpoint has them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from fabric_init.errors import OptionError
from fabric_init.planning.tensors import TensorInfo


def is_reinitialized(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether any of the globs names a tensor, by any of its ``names``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def check_reinit(slots: Sequence[TensorInfo], patterns: Sequence[str]) -> None:
    """Refuse globs that name nothing, or one name of a tied tensor but not all of them.

    Raises:
        OptionError: As said.
    """
    for pattern in patterns:
        if not any(is_reinitialized(slot.names, [pattern]) for slot in slots):
            raise OptionError(
                f"reinit={pattern!r} names no tensor of the model; names look like {slots[0].name!r}"
                if slots
                else f"reinit={pattern!r}: the model has no tensors"
            )
    for slot in slots if patterns else ():
        fresh = [name for name in slot.names if is_reinitialized([name], patterns)]
        others = [name for name in slot.names if name not in fresh]
        if fresh and others:
            raise OptionError(
                f"reinit names {', '.join(fresh)}, which is tied to {', '.join(others)}: they are one tensor. "
                f"Untie them in the model to give one of them new values, or name all: reinit={[*fresh, *others]}."
            )
