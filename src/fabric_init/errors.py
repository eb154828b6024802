"""Every exception that fabric_init raises on purpose::

    FabricInitError
    ├── RecordingError               a constructor did what cannot be recorded
    ├── CheckpointError              the file itself (also a ValueError)
    │   ├── CheckpointNotFoundError  no such file, shard or folder (also a FileNotFoundError)
    │   └── CheckpointFormatError    corrupt, truncated, unknown or unsafe content
    ├── CheckpointMismatchError      file and model disagree: keys, shapes, dtypes (also a ValueError)
    ├── UninitializedTensorError     a tensor that nobody filled is about to be used (also a RuntimeError)
    └── OutOfMemoryError             no room for the values (also a MemoryError and torch's OutOfMemoryError)

Each also derives from the built-in that plain PyTorch code would expect, so existing ``except`` clauses go on working.
"""

from __future__ import annotations

import errno

import torch


class FabricInitError(Exception):
    """The root of the tree: catches everything that fabric_init raises on purpose."""


class RecordingError(FabricInitError, RuntimeError):
    """A constructor did something that cannot be recorded, or a tensor has no recording to replay."""


class CheckpointError(FabricInitError, ValueError):
    """Something is wrong with a checkpoint file itself, whatever the model."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, a shard that its index names, or a folder with a checkpoint in it does not exist."""


class CheckpointFormatError(CheckpointError):
    """A checkpoint cannot be read: corrupt, truncated, of an unknown format, or carrying code."""


class CheckpointMismatchError(FabricInitError, ValueError):
    """Checkpoint and model disagree on keys, shapes or dtypes."""


class UninitializedTensorError(FabricInitError, RuntimeError):
    """A tensor that was neither loaded nor initialized is about to be used or saved."""


class OutOfMemoryError(FabricInitError, torch.OutOfMemoryError, MemoryError):
    """There is no memory for a tensor's values, on the device or the host; or no address space to map a file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says, in whatever way, that memory has run out: torch has no class of its own for it on the CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = "allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and told)
