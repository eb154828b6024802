"""Weights of compressed-tensors: the bits that it decompresses them to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from fabric_init import CheckpointMismatchError
from tests.checkpoints.quantized.conftest import Open, assert_reads

ROWS, COLUMNS = 70, 64
PACKED: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"num_bits": bits, "strategy": "group", "group_size": 16} for bits in (2, 3, 4, 5, 6, 7, 8)},
    "asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "asymmetric, 3 bits": {"num_bits": 3, "strategy": "channel", "symmetric": False},
    "channel": {"num_bits": 4, "strategy": "channel"},
    "tensor": {"num_bits": 4, "strategy": "tensor"},
}
NAIVE: dict[str, dict[str, Any]] = {
    "int8, channel": {"num_bits": 8, "strategy": "channel"},
    "int8, tensor": {"num_bits": 8, "strategy": "tensor"},
    "int8, group": {"num_bits": 8, "strategy": "group", "group_size": 16},
    "int8, asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "float8, channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "float8, tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8, block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
}


def compressed(
    said: dict[str, Any], format: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
    """What the library stores for a random weight, what it makes of that, and the config beside it."""
    args = QuantizationArgs(**said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    torch.manual_seed(4)
    weight = torch.randn(ROWS, COLUMNS, dtype=dtype)
    parts: tuple[int, ...] = (0, 1)
    if args.strategy == "group":
        apart = weight.view(ROWS, -1, args.group_size)
        low, high = apart.amin(-1), apart.amax(-1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -COLUMNS % columns, 0, -ROWS % rows))
        apart = padded.view(-(-ROWS // rows), rows, -(-COLUMNS // columns), columns)
        low, high = apart.amin((1, 3)), apart.amax((1, 3))
    else:
        parts = (1,) if args.strategy == "channel" else (0, 1)
        low, high = weight.amin(parts, keepdim=True), weight.amax(parts, keepdim=True)
    if args.strategy == "tensor":
        low, high = low.view(1), high.view(1)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale} | ({} if args.symmetric else {"weight_zero_point": zero})
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    plain = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": format}
    return stored, plain, config | {"config_groups": {"group_0": scheme.model_dump(mode="json")}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_integers_are_what_the_library_decompresses(name: str, dtype: torch.dtype, dequantized: Open) -> None:
    stored, plain, config = compressed(PACKED[name], "pack-quantized", dtype)
    reader = dequantized({f"a.{key}": value for key, value in stored.items()}, config)
    assert reader.keys() == ("a.weight",)
    assert_reads(reader, "a.weight", plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAIVE)
def test_bytes_are_what_the_library_decompresses(name: str, dtype: torch.dtype, dequantized: Open) -> None:
    format = "float-quantized" if name.startswith("float8") else "int-quantized"
    stored, plain, config = compressed(NAIVE[name], format, dtype)
    reader = dequantized({f"a.{key}": value for key, value in stored.items()}, config)
    assert reader.keys() == ("a.weight",)
    assert_reads(reader, "a.weight", plain)


@pytest.mark.parametrize("used", [True, False])
def test_inputs_may_be_of_any_group(used: bool, dequantized: Open) -> None:
    """Releases before 0.12 write each input's group, or -1 where groups follow one another."""
    stored, plain, config = compressed(PACKED["4 bits"], "pack-quantized", torch.float32)
    ordered = torch.arange(COLUMNS) // 16
    groups = ordered[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))]
    scale = stored["weight_scale"]
    numbers = (plain / scale[:, ordered]).round()
    expected = numbers * scale[:, groups] if used else plain
    indices = groups if used else torch.full((COLUMNS,), -1)
    assert_reads(dequantized(stored | {"weight_g_idx": indices.int()}, config), "weight", expected)


def test_without_the_config_it_is_refused(dequantized: Open) -> None:
    stored, _, _ = compressed(PACKED["4 bits"], "pack-quantized", torch.float32)
    with pytest.raises(CheckpointMismatchError, match=r"weight_packed is packed .* in config\.json to read it"):
        dequantized(stored, None)
    stored, _, _ = compressed(NAIVE["int8, channel"], "int-quantized", torch.float32)
    with pytest.raises(CheckpointMismatchError, match="no weight is quantized in a way that is known here"):
        dequantized(stored, None)


def test_what_does_not_go_together_is_refused(dequantized: Open) -> None:
    stored, _, config = compressed(PACKED["4 bits"], "pack-quantized", torch.float32)
    with pytest.raises(CheckpointMismatchError, match="that does not go together"):
        dequantized(stored | {"weight_packed": stored["weight_packed"][:, 1:]}, config)
    with pytest.raises(CheckpointMismatchError, match="that does not go together"):
        dequantized(stored | {"weight_zero_point": torch.zeros(2, 2, dtype=torch.int32)}, config)
