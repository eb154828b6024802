"""Integers that are packed into 32-bit words: GPTQ, AWQ, and ``pack-quantized`` of compressed-tensors.

All multiply in the dtype of their scales, as the libraries that wrote them do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fabric_init.checkpoints.mapping.conversion_checks import shape_of
from fabric_init.checkpoints.quantized.weights import (
    Quantized,
    Read,
    Stored,
    module_of,
    packed_span,
    unpacked,
    weights_of_groups,
)
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box
from fabric_init.errors import CheckpointMismatchError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word are which column's."""


def _words(read: Read, key: str, spec: TensorSpec, dim: int, bits: int, along: range, across: range) -> Tensor:
    """Return numbers that are packed along ``dim`` of two dimensions, with that dimension last."""
    span, begins = packed_span(along.start, along.stop, bits, spec.shape[dim])
    offsets, sizes = [span.start, across.start], [span.numel, len(across)]
    box = Box(tuple(offsets), tuple(sizes)) if dim == 0 else Box(tuple(offsets[::-1]), tuple(sizes[::-1]))
    words = read(key, box)
    numbers = unpacked(words.T if dim == 0 else words, bits, along.stop - begins)
    return numbers[..., along.start - begins :]


def _ranges(box: Box) -> tuple[range, range]:
    rows, columns = (range(at, at + size) for at, size in zip(box.offsets, box.sizes, strict=True))
    return rows, columns


@dataclass(frozen=True)
class GPTQ:
    """A weight of GPTQ, which is stored with inputs first. ``indices`` is the key of each input's group, if any."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]
    specs: Mapping[str, TensorSpec]
    bits: int
    plus_one: bool
    """Whether zero points are stored less one: all but the second version of the format."""
    size: int
    indices: str | None

    def values(self, read: Read, box: Box) -> Tensor:
        weight, zeros, scales = self.sources[:3]
        rows, columns = _ranges(box)
        groups = torch.arange(columns.start, columns.stop, device="cpu") // self.size
        if self.indices is not None:
            groups = read(self.indices, Box((columns.start,), (len(columns),))).long()
        low, high = int(groups.min()), int(groups.max()) + 1
        if low < 0 or high > self.specs[scales].shape[0]:
            raise CheckpointMismatchError(f"{self.indices} names group {high - 1 if low >= 0 else low}, which is none")
        numbers = _words(read, weight, self.specs[weight], 0, self.bits, columns, rows)
        zero = _words(read, zeros, self.specs[zeros], 1, self.bits, rows, range(low, high)).T
        zero = (zero + 1) & ((1 << self.bits) - 1) if self.plus_one else zero
        scale = read(scales, Box((low, rows.start), (high - low, len(rows)))).T
        return scale[:, groups - low] * (numbers - zero[:, groups - low]).to(scale.dtype)


@dataclass(frozen=True)
class AWQ:
    """A weight of AWQ, which is stored with inputs first, eight outputs to a word."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]
    size: int

    def values(self, read: Read, box: Box) -> Tensor:
        weight, zeros, scales = self.sources[:3]
        rows, columns = _ranges(box)
        low, high = columns.start // self.size, -(-columns.stop // self.size)
        groups = torch.arange(columns.start, columns.stop, device="cpu") // self.size - low
        numbers, zero = self._columns(read, weight, columns, rows), self._columns(read, zeros, range(low, high), rows)
        scale = read(scales, Box((low, rows.start), (high - low, len(rows))))
        return ((numbers - zero[groups]).to(scale.dtype) * scale[groups]).T

    def _columns(self, read: Read, key: str, inputs: range, outputs: range) -> Tensor:
        first = outputs.start // 8
        words = read(key, Box((inputs.start, first), (len(inputs), -(-outputs.stop // 8) - first)))
        apart = (words.unsqueeze(-1) >> torch.tensor([4 * place for place in _AWQ_ORDER], device="cpu")) & 0xF
        return apart.flatten(1)[:, outputs.start - 8 * first : outputs.stop - 8 * first]


@dataclass(frozen=True)
class PackedRows:
    """A weight of ``pack-quantized``: numbers along a row, zero points along a column."""

    key: str
    spec: TensorSpec
    sources: Sequence[str]
    specs: Mapping[str, TensorSpec]
    bits: int
    zero: str | None
    indices: str | None

    def values(self, read: Read, box: Box) -> Tensor:
        weight, scales = self.sources[:2]
        rows, columns = _ranges(box)
        number = 1 << (self.bits - 1)
        result = (_words(read, weight, self.specs[weight], 1, self.bits, columns, rows) - number).to(self.spec.dtype)
        there = self.specs[scales].shape
        width = there[1] if len(there) == 2 else 1
        groups = torch.arange(columns.start, columns.stop, device="cpu") // -(-self.spec.shape[1] // width)
        if self.indices is not None:
            named = read(self.indices, Box((columns.start,), (len(columns),))).long()
            groups = named if int(named.min()) >= 0 else groups  # -1: not used
        if self.zero is not None:
            zeros = _words(read, self.zero, self.specs[self.zero], 0, self.bits, rows, range(width)).T - number
            result = result - zeros[:, groups].to(result.dtype)
        one = len(there) < 2 or there[0] == 1
        scale = read(scales, None if one else Box((rows.start, 0), (len(rows), width))).reshape(-1, width)
        return result * scale[:, groups]


def gptq_or_awq(stored: Stored) -> list[Quantized]:
    """Return the weights of GPTQ or AWQ."""
    found: list[Quantized] = []
    for key in stored.specs:
        module = module_of(key, "qweight")
        if module is None:
            continue
        make = _BY_METHOD.get(stored.method)
        if make is None:
            raise CheckpointMismatchError(
                f"{key} is packed as GPTQ and AWQ do it. Which of them, and how, is said by quantization_config in "
                f"config.json, and {_said(stored)}: put the model's config.json beside the file"
            )
        names = [f"{module}{name}" for name in ("qweight", "qzeros", "scales")]
        lacking = [name for name in names if name not in stored.specs]
        if lacking:
            raise CheckpointMismatchError(f"there is {key}, but no {', '.join(lacking)}")
        found.append(make(stored, module, names))
    return found


def _said(stored: Stored) -> str:
    return f"that is of {stored.method!r}" if stored.method else "there is none"


def _gptq(stored: Stored, module: str, names: Sequence[str]) -> Quantized:
    config, (weight, zeros, scales) = stored.config, (stored.specs[name] for name in names)
    version = config.get("checkpoint_format") or "gptq"
    bits = config.get("bits")
    if version not in ("gptq", "gptq_v2") or bits not in (2, 3, 4, 8):
        raise CheckpointMismatchError(
            f"{names[0]} is GPTQ in the format {version!r} of {bits!r} bits, and read are 'gptq' and 'gptq_v2' of 2, "
            "3, 4 and 8 bits"
        )
    shape = torch.Size((weight.shape[-1], weight.shape[0] * 32 // bits))
    groups = scales.shape[0]
    indices = f"{module}g_idx"
    there = indices if indices in stored.specs else None
    fits = scales.shape[1:] == shape[:1] and zeros.shape == torch.Size((groups, -(-shape[0] * bits // 32)))
    if not fits or not groups or (there is not None and stored.specs[there].shape != shape[1:]):
        raise _no_fit(names, stored)
    size = config.get("group_size") or -1
    size = shape[1] if size < 1 else size
    if there is None and -(-shape[1] // size) != groups:
        raise _no_fit(names, stored)
    plain = TensorSpec(shape, scales.dtype, f"made of {names[0]} {shape_of(weight)}")
    sources = [*names, *([there] if there else [])]
    return GPTQ(f"{module}weight", plain, sources, stored.specs, bits, version == "gptq", size, there)


def _awq(stored: Stored, module: str, names: Sequence[str]) -> Quantized:
    config, (weight, zeros, scales) = stored.config, (stored.specs[name] for name in names)
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", 4)
    if version != "gemm" or bits != 4:
        raise CheckpointMismatchError(
            f"{names[0]} is AWQ in the version {version!r} of {bits!r} bits: read is 'gemm' of 4"
        )
    shape = torch.Size((weight.shape[1] * 8, weight.shape[0]))
    groups = scales.shape[0]
    if scales.shape[1:] != shape[:1] or zeros.shape != torch.Size((groups, weight.shape[1])) or shape[1] % groups:
        raise _no_fit(names, stored)
    plain = TensorSpec(shape, scales.dtype, f"made of {names[0]} {shape_of(weight)}")
    return AWQ(f"{module}weight", plain, names, shape[1] // groups)


_BY_METHOD: Mapping[str, Callable[[Stored, str, Sequence[str]], Quantized]] = {"gptq": _gptq, "awq": _awq}


def _no_fit(names: Sequence[str], stored: Stored) -> CheckpointMismatchError:
    shapes = ", ".join(f"{name} is {shape_of(stored.specs[name])}" for name in names)
    return CheckpointMismatchError(f"{shapes}: that does not go together")


def pack_quantized(stored: Stored) -> list[Quantized]:
    """Return the packed weights of compressed-tensors."""
    found: list[Quantized] = []
    for key in stored.specs:
        module = module_of(key, "weight_packed")
        if module is not None and f"{module}weight_shape" in stored.specs:
            found.append(_packed_rows(stored, module, key))
    return found


def _packed_rows(stored: Stored, module: str, key: str) -> Quantized:
    names = {name: f"{module}weight_{name}" for name in ("packed", "scale", "shape", "zero_point", "g_idx")}
    there = {name: stored.specs[full] for name, full in names.items() if full in stored.specs}
    if stored.method != "compressed-tensors" or "scale" not in there:
        raise CheckpointMismatchError(
            f"{key} is packed as compressed-tensors does it, and it takes weight_scale beside it and "
            "quantization_config in config.json to read it"
        )
    shape = torch.Size(stored.read(names["shape"], None).tolist())
    stated = {bits for group in weights_of_groups(stored.config) if isinstance(bits := group.get("num_bits"), int)}
    packed, scale = there["packed"].shape, there["scale"].shape
    fitting = [
        bits
        for bits in sorted(stated)
        if len(shape) == 2 and packed == torch.Size((shape[0], -(-shape[1] * bits // 32)))
    ]
    whole = scale.numel() == 1 or (len(scale) == 2 and scale[0] == shape[0] and scale[1] and not shape[1] % scale[1])
    if len(fitting) != 1 or not whole or not there["scale"].dtype.is_floating_point:
        raise _no_fit([names[name] for name in ("packed", "scale")], stored)
    zero = names["zero_point"] if "zero_point" in there else None
    if zero is not None and there["zero_point"].shape != torch.Size((-(-shape[0] * fitting[0] // 32), scale[-1])):
        raise _no_fit([key, zero], stored)
    made = f"made of {key} {shape_of(there['packed'])}"
    plain = TensorSpec(shape, there["scale"].dtype, made)
    sources = [names[name] for name in there]
    indices = names["g_idx"] if "g_idx" in there else None
    return PackedRows(f"{module}weight", plain, sources, stored.specs, fitting[0], zero, indices)
