"""``Dequantize``: float8 weights times their scales, for any region as on whole tensors in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Box, CheckpointReader, Dequantize, Span, open_checkpoint, take
from fabric_init.planning.recorded_load.converted import converted
from tests.support.ranks import run_ranks
from tests.support.watched import watched
from tests.support.zoo import assert_same, launch, weights

ROWS, COLUMNS, BLOCK = 10, 7, (4, 3)


def quantized(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def repeated(scale: Tensor, shape: torch.Size, block: tuple[int, int] = BLOCK) -> Tensor:
    """Each scale once for each element of its block."""
    rows = scale.repeat_interleave(block[0], -2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], -1)[..., : shape[-1]]


SCALES: dict[str, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
    "blocks": ((ROWS, COLUMNS), "weight_scale_inv", (3, 3)),
    "blocks of each expert": ((2, ROWS, COLUMNS), "weight_scale_inv", (2, 3, 3)),
    "rows": ((ROWS, COLUMNS), "weight_scale", (ROWS, 1)),
    "one": ((ROWS, COLUMNS), "weight_scale", ()),
    "one, with a dimension": ((ROWS, COLUMNS), "weight_scale", (1,)),
}


def saved(path: Path, kind: str) -> tuple[Path, Tensor]:
    """A file, and the weight that it means."""
    torch.manual_seed(2)
    shape, name, scales = SCALES[kind]
    weight, scale = quantized(*shape), torch.rand(scales) + 0.01
    save_file({"a.weight": weight, f"a.{name}": scale, "b.weight": torch.ones(2)}, path)
    expanded = repeated(scale, weight.shape) if kind.startswith("blocks") else scale
    return path, weight.to(torch.float32) * expanded


@pytest.mark.parametrize("kind", SCALES)
def test_every_region_is_that_of_the_whole_product(kind: str, tmp_path: Path) -> None:
    path, expected = saved(tmp_path / "m.safetensors", kind)
    reader: CheckpointReader = converted(open_checkpoint(path), [Dequantize(BLOCK)])
    assert set(reader.keys()) == {"a.weight", "b.weight"}
    assert torch.equal(reader.read("a.weight"), expected)
    for row in range(ROWS):
        ahead = (0,) * (expected.dim() - 2)
        box = Box((*ahead, row, 2), (*(1 for _ in ahead), min(4, ROWS - row), 4))
        assert torch.equal(reader.read("a.weight", box), take(expected, box))
        assert torch.equal(reader.read("a.weight", Span(row, 6 * row)), take(expected, Span(row, 6 * row)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)


def model_file(folder: Path) -> tuple[Path, Tensor]:
    torch.manual_seed(4)
    weight, scale = quantized(256, 128), torch.rand(8, 2)
    save_file(
        {"a.weight": weight, "a.weight_scale_inv": scale, "a.input_scale": torch.ones(())},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [32, 64]}}))
    product = weight.to(torch.float32) * repeated(scale, weight.shape, (32, 64))
    return folder, product.to(torch.bfloat16)


def test_the_refusal_proposes_it_and_the_config_states_the_size_of_blocks(tmp_path: Path) -> None:
    folder, expected = model_file(tmp_path)
    with deferred_init():
        model = Model()
    with pytest.raises(CheckpointMismatchError, match=r"Likely: convert=\[Dequantize\(\)\]"):
        materialize(model, checkpoint=folder)
    materialize(model, checkpoint=folder, convert=[Dequantize()])
    assert torch.equal(model.a.weight, expected)


def on_ranks(folder: Path) -> dict[str, Any]:
    opened = watched()
    fabric = launch("fsdp2")
    with fabric.init_module(checkpoint=folder, convert=[Dequantize(block=[32, 64])]):
        model = Model()
    before = len(opened[0].parts)
    found = weights(fabric.setup(model))
    itself = opened[0]
    sizes = [region.numel * itself.spec(key).dtype.itemsize for key, region in itself.parts[before:] if region]
    return {"weights": found, "bytes": sum(sizes), "whole": any(region is None for _, region in itself.parts[before:])}


def test_a_rank_reads_its_rows_and_the_scales_for_them(tmp_path: Path) -> None:
    folder, expected = model_file(tmp_path)
    for rank in run_ranks(2, on_ranks, folder=folder):
        assert_same(rank["weights"], {"a.weight": expected})
        assert not rank["whole"]
        assert rank["bytes"] == 128 * 128 + 4 * 2 * 4


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(())},
            "no weight is quantized in a way that is known here",
        ),
        (
            {"a.weight": quantized(8, 8), "a.weight_scale_inv": torch.ones(5, 2)},
            r"a\.weight is \(8, 8\) and a\.weight_scale_inv is \(5, 2\) torch\.float32: that is no scale for",
        ),
        ({"a.weight": quantized(8, 8), "a.weight_scale": torch.ones(8)}, r"a\.weight_scale is \(8,\)"),
        ({"a.weight": quantized(8), "a.weight_scale": torch.ones(8, 1)}, r"a\.weight_scale is \(8, 1\)"),
        ({"a.weight": quantized(4, 3), "a.weight_scale": torch.ones(1, 1).to(torch.uint8)}, r"\(1, 1\) torch\.uint8"),
    ],
)
def test_what_is_no_scale_is_refused(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointMismatchError, match=message):
        converted(open_checkpoint(tmp_path / "m.safetensors"), [Dequantize(BLOCK)])


def test_a_block_has_rows_and_columns() -> None:
    with pytest.raises(ValueError, match="should be the rows and columns of a block"):
        Dequantize(block=[128])
