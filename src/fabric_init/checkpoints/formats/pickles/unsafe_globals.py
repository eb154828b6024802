"""The functions and classes that a pickle names and that ``torch.load(weights_only=True)`` refuses."""

from __future__ import annotations

import io

from fabric_init._torch_internals import get_allowed_globals, get_globals_in_pkl, get_user_allowed_globals


def unsafe_globals(data: bytes) -> list[str]:
    """Return the names in the pickle ``data`` that ``weights_only`` refuses."""
    try:
        names = set(get_globals_in_pkl(io.BytesIO(data)))
    except Exception:  # corrupt as well: the caller reports the first error
        return []
    return sorted(names - get_allowed_globals().keys() - get_user_allowed_globals().keys())
