"""Reader for a folder of ``torch.distributed.checkpoint``, which FSDP2, tensor parallelism and Lightning save to.

The format: a ``.metadata`` file, and files ``__<rank>_<number>.distcp`` in which each chunk of each tensor is what
``torch.save`` makes of it, one after the other; see https://docs.pytorch.org/docs/stable/distributed.checkpoint.html.
Lightning's ``meta.pt`` beside it is not opened: it has what was saved besides model and optimizers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fabric_init.checkpoints.formats.dcp.contents import Chunk, Contents, TensorEntry
from fabric_init.checkpoints.formats.dcp.metadata import read_metadata
from fabric_init.checkpoints.formats.indexed_files import check_shard
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.formats.torch_save.archive import SavedTensor, find_saved_tensor, load_within
from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Box, Region, Span, boxes_of, full_box, overlap, window
from fabric_init.checkpoints.state_dicts import Location, choose_state_dict, describe
from fabric_init.checkpoints.storage.local import MAPPED_FILES, FileBytes, changed, identity, open_bytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.errors import CheckpointFormatError


class DCPReader(BaseReader):
    """One folder of ``torch.distributed.checkpoint``; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    Opening reads ``.metadata`` and the size of each file. A region is assembled from the chunks that it touches, and no
    others are read. A region in one chunk is a view of a private copy-on-write map, unless its bytes are not aligned to
    its dtype, which the format does not ensure: then it is copied. With ``mmap=False``, and where there are more files
    than can be mapped, everything is copied.

    The state dict is found as in torch files: under ``entry`` (``"generator"``, ``"app.model"``), or else under
    ``model``, ``state_dict`` or ``module``, or at the top level, or the only one; the state of optimizers is left out.
    ``note`` says where. Keys are those of the state dict, without the names it was found under.

    Raises:
        CheckpointNotFoundError: ``.metadata`` or a file that it names is missing.
        CheckpointFormatError: it is damaged, carries code, disagrees with the files, or several state dicts could be
            meant.
    """

    path: Path
    format = "torch.distributed.checkpoint"

    def __init__(self, folder: str | os.PathLike[str], *, mmap: bool = True, entry: str | None = None) -> None:
        self.path = Path(folder)
        metadata = self.path / ".metadata"
        contents = read_metadata(metadata)
        location = choose_state_dict(self.path, contents.state_dicts(), entry)
        self._tensors = {t.name: (key, t) for key, t in contents.tensors.items() if t.location == location}
        if len(self._tensors) < sum(t.location == location for t in contents.tensors.values()):
            raise CheckpointFormatError(f"{metadata}: two keys are of one name. Save the checkpoint again.")
        self.specs = {name: tensor.spec for name, (_, tensor) in self._tensors.items()}
        self._contents = contents
        self.extra_state = self._lazy_extra_state(location)
        self.note = _note(location, contents, len(self._tensors))
        items = [chunk.item for _, tensor in self._tensors.values() for chunk in tensor.chunks]
        counts = Counter(item.file for item in items)
        self._stats = {name: check_shard(metadata, name, count) for name, count in counts.items()}
        for item in items:
            size = self._stats[item.file].st_size
            if item.offset + item.length > size:
                raise CheckpointFormatError(
                    f"{self.path / item.file} has {size:,} bytes, and .metadata looks for "
                    f"{item.length:,} at {item.offset:,}. If a copy was cut short, make it again."
                )
        # Ranks write a file each; FileSystemWriter(single_file_per_rank=False) writes one for each tensor.
        self._mmap = mmap and len(counts) <= MAPPED_FILES
        self._files: dict[str, FileBytes | SafetensorsReader] = {}
        self._sources: dict[tuple[str, Box], SavedTensor | _InSafetensors] = {}

    def _lazy_extra_state(self, location: Location) -> Mapping[str, Any]:
        """Return a mapping that loads each extra state when it is looked up.

        A look-up raises :class:`~fabric_init.errors.CheckpointFormatError` for what ``weights_only=True`` refuses.
        """
        places: dict[str, list[tuple[Location, str]]] = {}
        for path, key in self._contents.extra_state(location):
            places.setdefault(path[0], []).append((path[1:], key))
        return _LazyMapping({name: partial(self._put_together, parts) for name, parts in places.items()})

    def _put_together(self, parts: list[tuple[Location, str]]) -> Any:
        """Return one extra state, unflattened."""
        if parts[0][0] == ():
            return self._value(parts[0][1])
        state: dict[str, Any] = {}
        for path, key in parts:
            inner = state
            for name in path[:-1]:
                inner = inner.setdefault(name, {})
                if not isinstance(inner, dict):
                    raise CheckpointFormatError(f"{self.path}: {key!r} lies in {name!r}, which is no dict.")
            inner[path[-1]] = self._value(key)
        return state

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, on the CPU; chunks outside the region are not read.

        Raises:
            KeyError: there is no such tensor.
            CheckpointFormatError: a file does not hold what the metadata says, or changed after it was opened.
        """
        shape = self.spec(key).shape
        full, tensor = self._tensors[key]
        if isinstance(region, Span):
            if len(tensor.chunks) == 1:
                return self._source(full, tensor, tensor.chunks[0]).read(region)
            out = torch.empty(region.numel, dtype=tensor.spec.dtype, device="cpu")
            done = 0
            for box in boxes_of(shape, region):
                out[done : done + box.numel].view(box.sizes).copy_(self._box(full, tensor, box))
                done += box.numel
            return out
        box = full_box(shape) if region is None else region
        if any(at < 0 or at + size > dim for at, size, dim in zip(box.offsets, box.sizes, shape, strict=True)):
            raise AssertionError(f"{box} sticks out of shape {tuple(shape)}")
        return self._box(full, tensor, box)

    def _box(self, full: str, tensor: TensorEntry, box: Box) -> torch.Tensor:
        touched = [(chunk, overlap(chunk.box, box)) for chunk in tensor.chunks]
        parts = [(chunk, common) for chunk, common in touched if common is not None]
        if len(parts) == 1:
            chunk, common = parts[0]
            return self._source(full, tensor, chunk).read(_relative(common, chunk.box.offsets))
        out = torch.empty(box.sizes, dtype=tensor.spec.dtype, device="cpu")
        for chunk, common in parts:
            value = self._source(full, tensor, chunk).read(_relative(common, chunk.box.offsets))
            target = _relative(common, box.offsets)
            out[tuple(slice(at, at + n) for at, n in zip(target.offsets, target.sizes, strict=True))].copy_(value)
        return out

    def places(self, key: str, region: Region | None = None) -> Iterator[Place]:
        shape, (_, tensor) = self.spec(key).shape, self._tensors[key]
        boxes = boxes_of(shape, region) if isinstance(region, Span) else [region or full_box(shape)]
        for box in boxes:
            for chunk in tensor.chunks:
                if (common := overlap(chunk.box, box)) is not None and not isinstance(
                    file := self._file(chunk.item.file), SafetensorsReader
                ):
                    part = window(chunk.box.sizes, _relative(common, chunk.box.offsets))
                    size, item = tensor.spec.dtype.itemsize, chunk.item
                    more = item.length - chunk.box.numel * size  # the directory of a zip file, and what aligns data
                    if more >= 0:
                        start = item.offset + part.start * size
                        yield file.place(start, min(start + part.extent * size + more, item.offset + item.length))

    def _source(self, full: str, tensor: TensorEntry, chunk: Chunk) -> SavedTensor | _InSafetensors:
        """Return the reader of a chunk. Two threads may both create one, which does no harm."""
        source = self._sources.get((full, chunk.box))
        if source is None:
            file, item = self._file(chunk.item.file), chunk.item
            if isinstance(file, SafetensorsReader):
                source = _find_in_safetensors(file, full, tensor, chunk)
            else:
                try:
                    source = find_saved_tensor(file, item.offset, item.length, tensor.spec.dtype, chunk.box.sizes)
                except CheckpointFormatError as error:
                    raise CheckpointFormatError(f"tensor {full!r}: {error}") from error
            self._sources[full, chunk.box] = source
        return source

    def _file(self, name: str) -> FileBytes | SafetensorsReader:
        if name not in self._files:
            file = open_bytes(self.path / name, mmap=self._mmap)
            then = self._stats[name]
            if identity(os.stat(self.path / name)) != identity(then):
                raise CheckpointFormatError(changed(self.path / name, then.st_size))
            # FileSystemWriter(serialization_format=SerializationFormat.SAFETENSORS) writes these under the same name.
            is_safetensors = file.head(9)[8:] == b"{"
            self._files[name] = SafetensorsReader(self.path / name, mmap=self._mmap) if is_safetensors else file
        return self._files[name]

    def _value(self, key: str) -> Any:
        """Read what is saved under a key that is not one of the state dict's tensors."""
        if key in self._contents.tensors:
            tensor = self._contents.tensors[key]
            for chunk in tensor.chunks:
                self._stats.setdefault(chunk.item.file, check_shard(self.path / ".metadata", chunk.item.file, 1))
            return self._box(key, tensor, full_box(tensor.spec.shape))
        item = self._contents.objects[key][2]
        check_shard(self.path / ".metadata", item.file, 1)
        file = open_bytes(self.path / item.file, mmap=False)
        try:
            return load_within(file, item.offset, item.length)
        except Exception as error:
            raise CheckpointFormatError(f"{file.path}: {key!r} cannot be loaded as plain data: {error}") from error


class _LazyMapping(Mapping[str, Any]):
    """Values that are computed at their first look-up."""

    def __init__(self, made: dict[str, Callable[[], Any]]) -> None:
        self._made = {key: cache(make) for key, make in made.items()}

    def __getitem__(self, key: str) -> Any:
        return self._made[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


class _InSafetensors(NamedTuple):
    """A chunk that is a tensor of a safetensors file."""

    file: SafetensorsReader
    key: str

    def read(self, region: Region | None) -> torch.Tensor:
        return self.file.read(self.key, region)


def _find_in_safetensors(file: SafetensorsReader, key: str, tensor: TensorEntry, chunk: Chunk) -> _InSafetensors:
    if sum(other.item.file == chunk.item.file for other in tensor.chunks) > 1:
        raise CheckpointFormatError(
            f"{file.path} was to hold several chunks of {key!r}, and a safetensors file holds one under a key. "
            f"Save the checkpoint again without SerializationFormat.SAFETENSORS."
        )
    expected = TensorSpec(torch.Size(chunk.box.sizes), tensor.spec.dtype)
    try:
        spec = file.spec(key)
    except KeyError:
        spec = None
    if spec != expected:
        raise CheckpointFormatError(f"{file.path}: .metadata says that {key!r} is {expected}; there is {spec}.")
    return _InSafetensors(file, key)


def _relative(box: Box, offsets: tuple[int, ...]) -> Box:
    return Box(tuple(at - offset for at, offset in zip(box.offsets, offsets, strict=True)), box.sizes)


def _note(location: Location, contents: Contents, taken: int) -> str | None:
    notes = [] if (where := describe(location)) is None else [where]
    if others := len(contents.tensors) - taken:
        notes.append(f"other tensors, left out: {others}")
    if contents.objects:
        notes.append(f"entries that are no tensors, left out: {len(contents.objects)}")
    return "; ".join(notes) or None
