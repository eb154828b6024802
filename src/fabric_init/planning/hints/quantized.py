"""Recognize checkpoints whose weights are quantized: integers or float8 beside the scales that give them a meaning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fabric_init._text import dtype_name, listed
from fabric_init.checkpoints import CheckpointReader, Dequantize
from fabric_init.checkpoints.quantized.config import quantization_config
from fabric_init.errors import FabricInitError
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action
from fabric_init.planning.recorded_load.converted import converted

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
    return _message(found, _dequantized(matching), reader)


def quantized_refusal(reader: CheckpointReader, load: Callable[[CheckpointReader], object]) -> str | None:
    """Return the message of the error for a load that fails, if it would not after weights are dequantized.

    Args:
        reader: The checkpoint.
        load: What loads; it raises if a checkpoint does not fit.
    """
    found = list(_pairs(reader))
    if not found:
        return None
    try:
        load(converted(reader, [Dequantize()]))
    except FabricInitError:
        return None
    return _message(found, Dequantize(), reader)


def unknown_scheme(matching: Matching, reader: CheckpointReader) -> str | None:
    """Return the message of the error for missing tensors whose modules have other keys in a quantized checkpoint."""
    method = quantization_config(reader.path).get("quant_method")
    others = {key.rpartition(".")[0] for key in matching.unexpected}
    packed = [slot.name for slot in matching.missing if slot.name.rpartition(".")[0] in others]
    if method is None or not packed:
        return None
    return (
        f"{reader.path} is quantized ({method}, says its config.json), and lacks tensors whose modules have keys that "
        "the model does not take: they may be the same weights, and strict=False would initialize them anew. Load it "
        "with the library that wrote it, dequantize it there, save that and load it here, or name them in reinit=[…].\n"
        + listed(packed)
    )


def _message(found: list[Quantized], declared: Dequantize | None, reader: CheckpointReader) -> str:
    kinds = ", ".join(dict.fromkeys(dtype_name(pair.dtype) for pair in found))
    fix = f"Likely: convert=[{declared}] makes them plain weights when they are read. Otherwise:\n" if declared else ""
    return (
        f"{reader.path} is quantized: {len(found)} of its weights are {kinds}, and mean something only with the scales "
        "beside them, which the model does not take. Without them the values would be wrong, so neither strict=False "
        "nor a rename that drops the scales loads them.\n"
        f"{fix}"
        "Dequantize the file once: load it with the library that wrote it (from_pretrained, with dequantize=True in "
        "its quantization_config where there is one, or model.dequantize()), save that, and load it here.\n"
        + listed([f"{pair.weight} ({dtype_name(pair.dtype)}), scaled by {pair.scale}" for pair in found])
    )


def _dequantized(matching: Matching) -> Dequantize | None:
    """Return the conversion after which the weights match as they did; ``None`` if there is none."""
    try:
        found = None if matching.again is None else matching.again((Dequantize(),), matching.options)
    except FabricInitError:
        return None
    if found is None or found.misfits or len(found.missing) > len(matching.missing):
        return None
    return Dequantize()


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
    module, _, name = scale.rpartition(".")
    if name.startswith("_") and name.endswith("_scale"):  # torchao
        yield f"{scale.removesuffix('scale')}qdata"
    if name.endswith("_scales"):  # mxfp4
        yield f"{scale.removesuffix('scales')}blocks"
    match = _SCALE_OF.fullmatch(scale)
    if match is not None:
        yield match["weight"]
