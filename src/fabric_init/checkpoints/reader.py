"""The interface of a checkpoint format: plan from the header, then read tensors, or regions of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import CheckpointError, is_out_of_memory


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor, as the header states them."""

    shape: torch.Size
    dtype: torch.dtype
    made: str = field(default="", compare=False)
    """The sources of a tensor that a conversion makes, in words; empty for any other."""


class CheckpointReader(Protocol):
    """One open checkpoint.

    Order of calls: :func:`~fabric_init.checkpoints.open_checkpoint` reads the header and returns a reader; then
    ``keys`` and ``spec`` answer without touching a byte of weight; then ``read`` as often as needed, from any thread.
    :class:`BaseReader` implements all of it but ``read``.
    """

    @property
    def path(self) -> AnyPath:
        """The file, folder or URL that was asked for; error messages name it."""
        ...

    format: str
    """The format in words, for reports, such as ``"safetensors"``, ``"sharded safetensors"`` or ``"torch"``."""
    note: str | None
    """Anything the user should know of how it was read (``"state dict found under 'model'"``), else ``None``."""

    @property
    def extra_state(self) -> Mapping[str, Any]:
        """Extra state (``nn.Module.get_extra_state``) that is not a tensor, by key; empty for formats of tensors."""
        ...

    def keys(self) -> Sequence[str]:
        """Return every tensor's checkpoint key, in the file's own order."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of one tensor, from the header.

        Raises:
            KeyError: there is no such tensor.
        """
        ...

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or the named region of it, on the CPU, in the checkpoint's dtype.

        When the file is mapped, the result is a view of a private copy-on-write map: writing to it never reaches the
        file.

        Raises:
            CheckpointFormatError: the bytes are not there.
            KeyError: there is no such tensor.
        """
        ...


class BaseReader(ABC):
    """A :class:`CheckpointReader` without ``read``, over a header that is held as ``specs``.

    A subclass sets ``path`` and ``specs`` in its constructor, ``format`` there or in its body, and the rest as needed.
    """

    path: AnyPath
    format: str
    note: str | None = None
    specs: Mapping[str, TensorSpec]
    """Shape and dtype of every tensor by its key, in the file's own order."""
    extra_state: Mapping[str, Any] = MappingProxyType({})
    """Extra state that is not a tensor, by its key."""
    metadata: Mapping[str, Any] | None = None
    """The ``_metadata`` of a saved ``state_dict()``, such as the versions of its modules."""
    fields: Mapping[str, Any] = MappingProxyType({})
    """What the file states beside its tensors, such as GGUF's fields or the metadata of safetensors."""
    collective: bool = False
    """Whether ``read`` is for all ranks to call together, with the same keys in the same order."""
    below: CheckpointReader | None = None
    """The checkpoint of whose tensors those of this one are made, if they are."""

    def keys(self) -> Sequence[str]:
        """Return every tensor's checkpoint key, in the file's own order."""
        return tuple(self.specs)

    def spec(self, key: str) -> TensorSpec:
        """Return shape and dtype of one tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        try:
            return self.specs[key]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {key!r}") from None

    def sources(self, key: str) -> Sequence[str]:
        """Return the keys of ``below`` that a tensor is made of; its own if it is one of them."""
        return (key,)

    def places(self, key: str, region: Region | None = None) -> Iterable[Place]:
        """Return where in files ``read`` will read, as far as that is known, to read it ahead."""
        below, sources = self.below, self.sources(key)
        if below is None:
            return ()
        if sources == (key,):
            return places(below, key, region)
        return [place for source in sources for place in places(below, source)] if region is None else ()

    @abstractmethod
    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or the named region of it, on the CPU, in the checkpoint's dtype."""


def is_collective(reader: CheckpointReader) -> bool:
    """Return whether ``reader.read`` is for all ranks to call together."""
    return bool(getattr(reader, "collective", False))


def metadata_of(reader: CheckpointReader) -> Mapping[str, Any] | None:
    """Return the ``_metadata`` of the state dict in a checkpoint, if the reader knows it."""
    return getattr(reader, "metadata", None)


def places(reader: CheckpointReader, key: str, region: Region | None = None) -> Iterable[Place]:
    """Return where in files ``reader.read`` will read, if the reader knows it."""
    return reader.places(key, region) if isinstance(reader, BaseReader) else ()


def fields_of(reader: CheckpointReader) -> Mapping[str, Any]:
    """Return what a checkpoint states of the model beside its tensors, if the reader knows it."""
    fields: Mapping[str, Any] = getattr(reader, "fields", {})
    return fields


def read(reader: CheckpointReader, key: str, region: Region | None = None) -> Tensor:
    """Return what ``reader`` reads.

    Raises:
        CheckpointError: the disk or the network fails.
    """
    try:
        return reader.read(key, region)
    except OSError as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise CheckpointError(f"{reader.path}: {key!r} cannot be read: {error}.") from error
