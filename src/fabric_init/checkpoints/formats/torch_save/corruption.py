"""Errors that say which file of ``torch.save`` is corrupt, for errors of any type that reading it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fabric_init.checkpoints.formats.torch_save.meta_tensors import QuantizedTensorError
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointFormatError, FabricInitError, OutOfMemoryError, is_out_of_memory


@contextmanager
def corruption_of(path: AnyPath) -> Iterator[None]:
    """Turn every error of the block into one that says that the file at ``path`` is corrupt."""
    # A corrupt pickle calls allowed functions with wrong arguments: the error can be of any type.
    try:
        yield
    except FabricInitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"{path}: out of memory while reading it ({error}).") from error
        if isinstance(error, QuantizedTensorError):
            raise CheckpointFormatError(f"{path}: {error}.") from error
        raise CheckpointFormatError(_corrupt(path, error)) from error


def _corrupt(path: AnyPath, error: Exception) -> str:
    reason = str(error).strip().split("\n")[-1][:300]
    return (
        f"{path} cannot be read as a file of torch.save: {reason} ({type(error).__name__}). If a download or copy was "
        f"cut short, fetch it again; a TorchScript archive must be saved as a state dict first."
    )
