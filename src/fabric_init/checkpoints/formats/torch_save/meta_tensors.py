"""Load a pickle of ``torch.save`` with its tensors on the meta device, and read their values by region."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import torch

from fabric_init._torch_internals import WeightsOnlyUnpickler
from fabric_init.checkpoints.region import Region, Span, Window, take
from fabric_init.checkpoints.storage.local import FileBytes, places_of_window
from fabric_init.checkpoints.storage.read_ahead import Place


class Storages(Protocol):
    """Knows which tensors on the meta device have values in a file."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's values are in a file."""
        ...

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's last element lies inside its storage."""
        ...


class MetaStorages:
    """Storages on the meta device for those that a pickle names, by their keys in the file."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        """Key -> bytes, as the pickle has it and in its order."""
        self.counts: dict[str, int] = {}
        """Key -> elements."""
        self._keys: dict[int, tuple[str, torch.UntypedStorage]] = {}
        self._typed: dict[tuple[str, torch.dtype], torch.storage.TypedStorage] = {}

    def storage(self, dtype: torch.dtype, key: str, count: int) -> torch.storage.TypedStorage:
        """Return the storage that the pickle names as ``key``."""
        nbytes = count * dtype.itemsize
        if not 0 <= nbytes < 2**62 or self.sizes.setdefault(key, nbytes) != nbytes:
            raise ValueError(f"storage {key} is stated to have {nbytes:,} bytes")
        known = self._typed.get((key, dtype))
        if known is not None:
            return known
        self.counts.setdefault(key, count)
        untyped = torch.UntypedStorage(nbytes, device="meta")
        self._keys[untyped._cdata] = key, untyped
        typed = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._typed.setdefault((key, dtype), typed)

    def key(self, tensor: torch.Tensor) -> str:
        """Return the key of the tensor's storage."""
        return self._keys[tensor.untyped_storage()._cdata][0]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor's values are in the file; one saved from the meta device has none."""
        return tensor.is_meta and tensor.layout is torch.strided and tensor.untyped_storage()._cdata in self._keys

    def reaches(self, tensor: torch.Tensor) -> bool:
        """Return whether the last element lies in the storage: on the meta device torch lets a storage grow instead."""
        extent = Window(0, tuple(tensor.shape), tensor.stride()).extent
        stop = (int(tensor.storage_offset()) + extent) * tensor.element_size()
        return not extent or stop <= self.sizes[self.key(tensor)]


StorageOf = Callable[[torch.dtype, str, int], torch.storage.TypedStorage]
"""Returns the stand-in for a storage in the file, by its dtype, its key and the number of its elements."""


def load_meta(file: BinaryIO, storage_of: StorageOf, *, legacy: bool = False) -> Any:
    """Load a pickle of ``torch.save`` as ``weights_only=True`` does, its tensors on stand-ins for their storages."""
    start = file.tell()
    unpickler = _Unpickler(file, encoding="utf-8")
    unpickler.storage_of, unpickler.legacy = storage_of, legacy
    try:
        return unpickler.load()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        file.seek(start)
        raise QuantizedTensorError(
            f"{_quantized_in(file)}: only dense, unquantized tensors can be read; dequantize() it before saving"
        ) from error


class QuantizedTensorError(ValueError):
    """A pickle has a quantized tensor in it, which cannot be read; the message names it."""


def _quantized_in(file: BinaryIO) -> str:
    """Return key and dtype of the first quantized tensor in a pickle, in words."""
    key, found = None, False
    with suppress(Exception):  # what has been unpickled so far is no corrupt pickle
        for _, argument, _ in pickletools.genops(file):
            if not isinstance(argument, str):
                continue
            if argument.startswith("torch._utils _rebuild_q"):
                found = True
            elif found and (kind := re.search(r"(\w+)Storage$", argument)) is not None:
                return f"tensor {key!r} is quantized, torch.{kind[1].lower()}"
            elif not found:
                key = argument
    return f"tensor {key!r} is quantized" if found else "it has quantized tensors in it"


class _Unpickler(WeightsOnlyUnpickler):
    storage_of: StorageOf
    legacy: bool

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        # In the legacy format a sixth says which view of a storage; torch has not written any since 0.4.
        if not isinstance(pid, tuple) or len(pid) != 5 + self.legacy or pid[5:] not in ((), (None,)):
            raise ValueError(f"a storage is stated as {pid!r:.80}")
        _, kind, key, _, count = pid[:5]
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"a storage has the key {key!r:.80} and {count!r:.80} elements")
        return self.storage_of(dtype, key, count)


def read_region(file: FileBytes, start: int, tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
    """Return a region of a tensor on the meta device whose storage has its first byte at ``start`` of a file."""
    if isinstance(region, Span) and tensor.dim() > 1 and not tensor.is_contiguous():
        row = max(1, tensor[0].numel())
        first, stop = region.start // row, -(-region.stop // row)
        rows = _values(file, start, tensor[first:stop])
        return take(rows, Span(region.start - first * row, region.stop - first * row))
    return _values(file, start, take(tensor, region))


def places_of_region(file: FileBytes, start: int, tensor: torch.Tensor, region: Region | None) -> Iterator[Place]:
    """Yield where :func:`read_region` reads, for the same arguments."""
    if isinstance(region, Span) and tensor.dim() > 1 and not tensor.is_contiguous():
        row = max(1, tensor[0].numel())
        part = tensor[region.start // row : -(-region.stop // row)]
    else:
        part = take(tensor, region)
    if part.numel():
        yield from places_of_window(file, part.dtype, start, _window(part)[0])


def _values(file: FileBytes, start: int, part: torch.Tensor) -> torch.Tensor:
    values = _strided(file, part, start) if part.numel() else torch.empty(part.shape, dtype=part.dtype, device="cpu")
    values = values.conj() if part.is_conj() else values
    return (values._neg_view() if part.is_neg() else values).resolve_conj().resolve_neg().detach()


def _strided(file: FileBytes, part: torch.Tensor, offset: int) -> torch.Tensor:
    """Return the values of a tensor with any strides, from a storage whose first byte lies at ``offset``."""
    window, order = _window(part)
    values = file.tensor(part.dtype, offset, window)
    if order is None:
        return values.as_strided(part.shape, part.stride())
    return values.permute([order.index(dim) for dim in range(part.dim())])


def _window(part: torch.Tensor) -> tuple[Window, list[int] | None]:
    """Return the window of a storage that a tensor with any strides is, and the order of its dimensions in there."""
    # A FileBytes reads windows of row-major tensors; a transposed one is such a window with its dimensions in order.
    order = sorted(range(part.dim()), key=lambda dim: (-part.stride()[dim], dim))
    ordered, first = part.permute(order), int(part.storage_offset())
    sizes, strides = tuple(ordered.shape), ordered.stride()
    if all(stride >= inner * size for stride, inner, size in zip(strides, strides[1:], sizes[1:], strict=False)):
        return Window(first, sizes, strides), order
    # Overlapping (an expanded tensor, say): what lies between its first and last element, once.
    return Window(first, (Window(0, sizes, strides).extent,), (1,)), None
