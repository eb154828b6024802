"""Give modules the extra state that a checkpoint has for them."""

from __future__ import annotations

from collections.abc import Iterable

from fabric_init.checkpoints.reader import read
from fabric_init.planning.extra_state import Extra


def set_extra_states(extras: Iterable[Extra]) -> None:
    """Set the extra state of each module from its checkpoint, where it is plain data or a tensor.

    All ranks call this with the same modules in the same order: reading a tensor may need all of them.
    """
    for module, key, reader in extras:
        plain = reader.extra_state
        module.set_extra_state(plain[key] if key in plain else read(reader, key))
