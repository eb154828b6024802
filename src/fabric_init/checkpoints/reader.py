"""What a checkpoint format has to offer so that it can be planned from its header and read in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointError, is_out_of_memory


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the header says about one tensor."""

    shape: torch.Size
    dtype: torch.dtype
    made: str = field(default="", compare=False)
    """In words, of what it is made, where a conversion makes it; else empty."""


class CheckpointReader(Protocol):
    """One open checkpoint.

    Order of calls: :func:`~fabric_init.checkpoints.open_checkpoint` reads the header and returns a reader; then
    ``keys`` and ``spec`` answer without touching a byte of weight; then ``read`` as often as wanted, from any thread.
    """

    @property
    def path(self) -> AnyPath:
        """The file, folder or URL that was asked for; error messages name it."""
        ...

    format: str
    """The format in words, for reports, such as ``"safetensors"``, ``"sharded safetensors"`` or ``"torch"``."""
    note: str | None
    """Anything the user should know of how it was read (``"state dict found under 'model'"``), else ``None``."""

    def keys(self) -> Sequence[str]:
        """Every tensor's checkpoint key, in the file's own order."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Shape and dtype of one tensor, from the header. Raises ``KeyError`` for an unknown key."""
        ...

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """The tensor, or the named region of it, on the CPU, in the checkpoint's dtype.

        When the file is mapped, the result is a view of a private copy-on-write map: writing to it never reaches the
        file. Raises :class:`~fabric_init.errors.CheckpointFormatError` when the bytes are not there.
        """
        ...


def read(reader: CheckpointReader, key: str, region: Region | None = None) -> Tensor:
    """As ``reader`` reads it.

    Raises:
        CheckpointError: the disk or the network fails.
    """
    try:
        return reader.read(key, region)
    except OSError as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise CheckpointError(f"{reader.path}: {key!r} cannot be read: {error}.") from error
