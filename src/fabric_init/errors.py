"""The exceptions of fabric_init::

    FabricInitError
    ├── OptionError                  an option that is invalid, or useless here (also a ValueError)
    ├── RecordingError               a constructor did what cannot be recorded (also a RuntimeError)
    ├── CheckpointError              the file itself (also a ValueError)
    │   ├── CheckpointNotFoundError  no such file, shard or folder (also a FileNotFoundError)
    │   └── CheckpointFormatError    corrupt, truncated, unknown or unsafe content
    ├── CheckpointMismatchError      file and model disagree: keys, shapes, dtypes (also a ValueError)
    ├── UninitializedTensorError     a tensor without values is about to be used (also a RuntimeError)
    ├── RanksDisagreeError           ranks built, opened or chose different things
    ├── RanksLostError               a rank has died, or cannot be reached
    └── OutOfMemoryError             no memory for the values (also a MemoryError and torch's OutOfMemoryError)

Each also derives from the built-in that plain PyTorch code would expect, so existing ``except`` clauses keep working.
An argument that is wrong whatever the model and the file (a string in place of a list, an unknown name of a mode)
raises Python's own ``TypeError`` or ``ValueError``.
"""

from __future__ import annotations

import errno

import torch


class FabricInitError(Exception):
    """The base class of all exceptions of fabric_init."""


class OptionError(FabricInitError, ValueError):
    """An option is invalid, needs another one, or names nothing: ``rename`` without ``checkpoint``, for example."""


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


class RanksDisagreeError(FabricInitError):
    """Ranks that fill one model differ in the model, the checkpoint or an option; the message lists which ranks."""


class RanksLostError(FabricInitError):
    """A rank has died, or cannot be reached."""


class OutOfMemoryError(FabricInitError, torch.OutOfMemoryError, MemoryError):
    """There is no memory for a tensor's values, on the device or the host; or no address space to map a file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` reports that memory ran out; on the CPU torch raises a plain ``RuntimeError`` for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in message or "not enough memory" in message)
