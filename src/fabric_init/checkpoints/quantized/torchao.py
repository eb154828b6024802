"""Weights of torchao in safetensors: int8 and float8 in blocks, described by the metadata of the file."""

from __future__ import annotations

import json
from typing import Any

import torch

from fabric_init.checkpoints.mapping.conversion_checks import shape_of
from fabric_init.checkpoints.quantized.scaled import Scaled
from fabric_init.checkpoints.quantized.weights import Quantized, Stored
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.errors import CheckpointMismatchError

_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_KNOWN = (*_INTEGERS, "Float8Tensor")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def torchao(stored: Stored) -> list[Quantized]:
    """Return the weights of torchao."""
    found: list[Quantized] = []
    for data in stored.specs:
        module, _, name = data.rpartition(".")
        if not (name.startswith("_") and name.endswith("_qdata")):
            continue
        parameter = name[1:].removesuffix("_qdata")
        key = f"{module}.{parameter}" if module else parameter
        found.append(_weight(stored, key, data.removesuffix("qdata")))
    return found


def _weight(stored: Stored, key: str, prefix: str) -> Quantized:
    there = {name.removeprefix(prefix): spec for name, spec in stored.specs.items() if name.startswith(prefix)}
    try:
        said: dict[str, Any] = json.loads(stored.fields[key])
        kind, details = said["_type"], said["_data"]
        if kind not in _KNOWN:
            raise CheckpointMismatchError(f"{key} is torchao's {kind}, and read are {', '.join(_KNOWN)}")
        dtype, blocks = _DTYPES[details["dtype"]["_data"]], tuple(map(int, details["block_size"]))
        weight, scale = there["qdata"], there["scale"]
        full = tuple(weight.shape)
        counts = [-(-size // block) for size, block in zip(full, blocks, strict=True)]
        zero = f"{prefix}zero_point" if kind in _INTEGERS and "zero_point" in there else None
        sizes = [list(there[name].shape) for name in ("scale", "zero_point") if name in there]
        of_one = all(count == 1 for count in counts)
        if weight.dtype.itemsize != 1 or any(size != counts and not (of_one and size in ([], [1])) for size in sizes):
            raise ValueError(f"{weight.dtype} {full} with scales {tuple(scale.shape)} for blocks of {blocks}")
        if set(there) - {"qdata", "scale", "zero_point"}:
            raise ValueError(f"there is {', '.join(sorted(there))}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointMismatchError):
            raise
        raise CheckpointMismatchError(f"the metadata of the file does not describe {prefix}qdata: {error}") from None
    sources = [f"{prefix}qdata", f"{prefix}scale", *(f"{prefix}{name}" for name in there if name == "zero_point")]
    plain = TensorSpec(weight.shape, dtype, f"made of {prefix}qdata {shape_of(weight)}")
    return Scaled(key, plain, sources, blocks, dtype if kind in _INTEGERS else torch.float32, zero)
