"""Recognize checkpoints whose weights are quantized: integers or float8 beside the scales that give them a meaning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fabric_init._text import dtype_name, listed
from fabric_init.checkpoints import CheckpointReader, Dequantize
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import FabricInitError
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action

_SCALES = (
    "weight_scale_inv",  # DeepSeek-V3, in blocks of 128 × 128
    "weight_scale",  # compressed-tensors, torchao, fbgemm
    "weight_scale_2",  # ModelOpt
    "scale_weight",  # ComfyUI
    "SCB",  # bitsandbytes, int8
    "scales",
    "weight.absmax",  # bitsandbytes, 4 bits
)
_PACKED = ("qweight", "weight_packed")  # GPTQ, AWQ; compressed-tensors
_SCALE_OF = re.compile(r"(?P<weight>.+)_scale(?:_inv)?")  # of tensors that are not called weight: gate_up_proj_scale


class Quantized(NamedTuple):
    """A weight and the scale that it needs, both as checkpoint keys."""

    weight: str
    scale: str
    dtype: torch.dtype


def unscaled(matching: Matching, reader: CheckpointReader) -> list[Quantized]:
    """Return the quantized weights that a tensor would take without their scale, or that none can take."""
    loaded = {key: entry.slot.dtype for entry in matching.entries if entry.action is Action.LOAD for key in entry.keys}
    unexpected = set(matching.unexpected)
    found = []
    for pair in _pairs(reader):
        if pair.scale in matching.taken:
            continue  # the model scales by itself
        as_float = pair.weight in loaded and loaded[pair.weight] != pair.dtype
        if as_float or (pair.weight in unexpected and pair.scale in unexpected and bool(matching.missing)):
            found.append(pair)
    return found


def quantized_message(found: list[Quantized], matching: Matching, reader: CheckpointReader) -> str:
    """Return the message of the error."""
    kinds = ", ".join(dict.fromkeys(dtype_name(pair.dtype) for pair in found))
    declared = _dequantized(matching, reader)
    mend = f"Likely: convert=[{declared}] multiplies them when they are read. Otherwise:\n" if declared else ""
    return (
        f"{reader.path} is quantized: {len(found)} of its weights are {kinds}, and mean something only with the scales "
        "beside them, which the model does not take. Without them the values would be wrong, so neither strict=False "
        "nor a rename that drops the scales loads them.\n"
        f"{mend}"
        "Dequantize the file once: load it with the library that wrote it (from_pretrained, with dequantize=True in "
        "its quantization_config where there is one, or model.dequantize()), save that, and load it here.\n"
        + listed([f"{pair.weight} ({dtype_name(pair.dtype)}), scaled by {pair.scale}" for pair in found])
    )


def _dequantized(matching: Matching, reader: CheckpointReader) -> Dequantize | None:
    """Return the conversion after which the weights match as they did; ``None`` if there is none."""
    conversion = Dequantize(_block_size(reader.path) or Dequantize.block)
    try:
        found = None if matching.again is None else matching.again((conversion,), matching.options)
    except FabricInitError:
        return None
    if found is None or found.misfits or len(found.missing) > len(matching.missing):
        return None
    return conversion


def _block_size(path: AnyPath) -> Sequence[int] | None:
    """Return the size of blocks that config.json beside a checkpoint states."""
    if not isinstance(path, Path):
        return None
    try:
        config = json.loads(((path if path.is_dir() else path.parent) / "config.json").read_text())
        rows, columns = map(int, config["quantization_config"]["weight_block_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (rows, columns) if min(rows, columns) > 0 else None


def _pairs(reader: CheckpointReader) -> Iterator[Quantized]:
    keys = set(reader.keys())
    for key in reader.keys():
        for weight in _weights_of(key):
            if weight in keys and (packed := reader.spec(weight).dtype).itemsize == 1 and packed is not torch.bool:
                yield Quantized(weight, key, packed)
                break
            if weight in keys and weight.rpartition(".")[2] in _PACKED:
                yield Quantized(weight, key, packed)
                break


def _weights_of(scale: str) -> Iterator[str]:
    """Yield the keys that a weight can have if ``scale`` is the key of its scale."""
    for ending in _SCALES:
        module = scale.removesuffix(ending)
        if module != scale and (not module or module.endswith(".")):
            for weight in ("weight", *_PACKED):
                yield f"{module}{weight}"
            return
    match = _SCALE_OF.fullmatch(scale)
    if match is not None:
        yield match["weight"]
        yield f"{match['weight']}_qdata"  # torchao
