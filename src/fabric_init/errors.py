"""Every exception that fabric_init raises on purpose::

    FabricInitError
    ├── RecordingError               a constructor did what cannot be recorded
    ├── CheckpointError              the file itself (also a ValueError)
    │   ├── CheckpointNotFoundError  no such file, shard or folder (also a FileNotFoundError)
    │   └── CheckpointFormatError    corrupt, truncated, unknown or unsafe content
    ├── CheckpointMismatchError      file and model disagree: keys, shapes, dtypes (also a ValueError)
    └── UninitializedTensorError     a tensor that nobody filled is about to be used (also a RuntimeError)

Each also derives from the built-in that plain PyTorch code would expect, so existing ``except`` clauses go on working.
"""

from __future__ import annotations


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
    """A tensor that was neither loaded nor initialised is about to be used or saved."""
