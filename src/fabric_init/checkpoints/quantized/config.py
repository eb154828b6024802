"""The ``quantization_config`` that transformers writes into config.json, beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.checkpoints.storage.remote import AnyPath

_MOST_BYTES = 10_000_000


def quantization_config(path: AnyPath) -> Mapping[str, Any]:
    """Return what config.json beside the checkpoint at ``path`` says of quantization; nothing, if there is none."""
    try:
        file = open_bytes((path if path.is_dir() else path.parent) / "config.json", mmap=False)
        config = json.loads(file.head(min(file.size, _MOST_BYTES)))
        found = config.get("quantization_config") or config.get("compression_config")
        if found is None:  # of models that have several parts, such as one for text
            parts = [part for part in config.values() if isinstance(part, dict) and "quantization_config" in part]
            found = parts[0]["quantization_config"] if len(parts) == 1 else None
    except (OSError, ValueError, RecursionError, AttributeError):  # CheckpointErrors are ValueErrors
        return {}
    return found if isinstance(found, dict) else {}
