"""Reader for GGUF files, llama.cpp's format: the tensors by llama.cpp's names, dequantized when they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fabric_init._text import joined
from fabric_init.checkpoints.formats.gguf.blocks import dequantized
from fabric_init.checkpoints.formats.gguf.header import Header, StoredTensor, read_header
from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Box, Region, Span, Window, boxes_of, full_box, span_of_boxes, take, window
from fabric_init.checkpoints.storage.local import FileBytes, Opener, open_bytes, places_of_window
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath, as_path
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFReader(BaseReader):
    """One GGUF file, or all parts of a split one; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    Keys are llama.cpp's names, shapes are torch's. F32, F16 and BF16 tensors are read as they are; quantized ones are
    float32, dequantized by the package ``gguf``: of a region, the blocks that it touches.

    Raises:
        CheckpointNotFoundError: the file or a part of it is missing.
        CheckpointFormatError: it is damaged, or has tensors of a type that cannot be read.
    """

    format = "GGUF"

    def __init__(
        self, path: str | os.PathLike[str] | AnyPath, *, mmap: bool = True, opener: Opener | None = None
    ) -> None:
        self.path = as_path(path)
        self._tensors: dict[str, tuple[FileBytes, StoredTensor]] = {}
        self.fields: Mapping[str, Any] = {}

        def opened(part: AnyPath) -> tuple[FileBytes, Header]:
            file = open_bytes(part, mmap=mmap) if opener is None else opener(part)
            return file, read_header(file)

        file, header = opened(self.path)
        count = _count_of(header)
        parts = [(file, header)] if count == 1 else [opened(part) for part in _parts(self.path, count)]
        for number, (file, header) in enumerate(parts):
            _check_part(file.path, header, number, count)
            self.fields = {**header.fields, **self.fields}  # the first part says most
            for tensor in header.tensors:
                if tensor.key in self._tensors:
                    raise CheckpointFormatError(f"{file.path}: the tensor {tensor.key!r} is in an earlier part, too.")
                self._tensors[tensor.key] = file, tensor
        self._check_count(count)
        self.specs = {
            key: TensorSpec(torch.Size(tensor.shape), tensor.type.dtype) for key, (_, tensor) in self._tensors.items()
        }
        self.note = self._notes(count)

    def _check_count(self, count: int) -> None:
        stated = self.fields.get("split.tensors.count", len(self._tensors))
        if count > 1 and stated != len(self._tensors):
            raise CheckpointFormatError(
                f"{self.path}: the parts hold {len(self._tensors):,} tensors together, of {stated:,}. They are not of "
                "one model: fetch them again."
            )

    def _notes(self, count: int) -> str | None:
        kinds = sorted({tensor.type.name for _, tensor in self._tensors.values() if not tensor.type.plain})
        architecture = self.fields.get("general.architecture")
        notes = [f"architecture {architecture}"] if architecture else []
        notes += [f"{', '.join(kinds)} dequantized"] if kinds else []
        notes += [f"{count} parts"] if count > 1 else []
        return "; ".join(notes) or None

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, on the CPU.

        Raises:
            KeyError: there is no such tensor.
            CheckpointFormatError: the file changed after it was opened.
        """
        spec = self.spec(key)
        file, tensor = self._tensors[key]
        if tensor.type.plain:
            return file.tensor(spec.dtype, tensor.offset, window(spec.shape, region))
        if isinstance(region, Span):
            return span_of_boxes(spec.shape, region, spec.dtype, lambda box: _values(file, tensor, box))
        return _values(file, tensor, region or full_box(spec.shape))

    def places(self, key: str, region: Region | None = None) -> Iterator[Place]:
        shape, (file, tensor) = self.spec(key).shape, self._tensors[key]
        if tensor.type.plain:
            return places_of_window(file, tensor.type.dtype, tensor.offset, window(shape, region))
        boxes = boxes_of(shape, region) if isinstance(region, Span) else [region or full_box(shape)]
        blocks = [_blocks(tensor, box) for box in boxes if box.numel]
        return (place for each in blocks for place in places_of_window(file, torch.uint8, tensor.offset, each))


def _blocks(tensor: StoredTensor, box: Box) -> Window:
    """Return the blocks of a quantized tensor that a box touches, in bytes."""
    block, size = tensor.type.block, tensor.type.bytes
    first, last = box.offsets[-1] // block, -(-(box.offsets[-1] + box.sizes[-1]) // block)
    stored = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    return window(stored, Box((*box.offsets[:-1], first * size), (*box.sizes[:-1], (last - first) * size)))


def _values(file: FileBytes, tensor: StoredTensor, box: Box) -> torch.Tensor:
    """Return a box of a quantized tensor, from the blocks that it touches."""
    if not box.numel:
        return torch.empty(box.sizes, dtype=tensor.type.dtype, device="cpu")
    values = dequantized(file.tensor(torch.uint8, tensor.offset, _blocks(tensor, box)), tensor.type)
    return take(values, Box((*[0] * (len(box.sizes) - 1), box.offsets[-1] % tensor.type.block), box.sizes))


def chosen_of(names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that are GGUF files, of a split one its first part."""
    found = [name for name in names if name.endswith(".gguf")]
    return [name for name in found if (match := _PART.fullmatch(name)) is None or int(match["number"]) == 1]


def parts_of(name: str) -> list[str]:
    """Return the names of all parts of the GGUF file that ``name`` is or belongs to."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _count_of(header: Header) -> int:
    count = header.fields.get("split.count", 1)
    return count if isinstance(count, int) and count > 1 else 1


def _parts(path: AnyPath, count: int) -> list[AnyPath]:
    names = parts_of(path.name)
    if len(names) != count:
        raise CheckpointFormatError(
            f"{path} is one of {count} parts. Their names should end in -00001-of-{count:05}.gguf and so on, so that "
            "the others are found; or merge them with llama-gguf-split --merge."
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointNotFoundError(f"{path} is one of {count} parts, and there is no {joined(missing)} beside it.")
    return [path.parent / name for name in names]


def _check_part(path: AnyPath, header: Header, number: int, count: int) -> None:
    there = header.fields.get("split.no", 0), _count_of(header)
    if there != (number, count):
        raise CheckpointFormatError(
            f"{path} says that it is part {there[0]!r} of {there[1]}, from 0 on, where part {number} of {count} "
            "should be."
        )
