"""Quantized checkpoints on two FSDP2 ranks: the same bits, and each rank reads what its rows are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import deferred_init, materialize
from fabric_init.checkpoints import Box, Dequantize, Span
from tests.checkpoints.quantized.test_bitsandbytes import four_bits
from tests.checkpoints.quantized.test_gptq_awq import INPUTS, OUTPUTS, awq, gptq
from tests.support.ranks import run_ranks
from tests.support.watched import watched
from tests.support.zoo import assert_same, launch, weights

SHAPES = {"bitsandbytes": (256, 256), "gptq": (OUTPUTS, INPUTS), "awq": (OUTPUTS, INPUTS)}


def write(folder: Path) -> dict[str, Path]:
    layer = four_bits("nf4", torch.bfloat16, True, *SHAPES["bitsandbytes"], bias=False)
    states: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "bitsandbytes": (layer.state_dict(), {"quant_method": "bitsandbytes"}),
        "gptq": (gptq(4, "gptq", False)[0], {"quant_method": "gptq", "bits": 4, "group_size": 32}),
        "awq": (awq()[0], {"quant_method": "awq", "bits": 4, "group_size": 32}),
    }
    paths = {}
    for name, (state, config) in states.items():
        paths[name] = folder / name
        paths[name].mkdir()
        save_file({f"a.{key}": value.contiguous() for key, value in state.items()}, paths[name] / "model.safetensors")
        (paths[name] / "config.json").write_text(json.dumps({"quantization_config": config}))
    return paths


class Model(nn.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.a = nn.Linear(shape[1], shape[0], bias=False)


def on_ranks(paths: dict[str, Path]) -> dict[str, Any]:
    opened = watched()
    found = {}
    for name, path in paths.items():
        opened.clear()
        fabric = launch("fsdp2")
        with fabric.init_module(checkpoint=path, convert=[Dequantize()]):
            model = Model(SHAPES[name])
        file = opened[0]
        before = len(file.parts)
        whole = weights(fabric.setup(model))
        read = sum(
            (region.numel if isinstance(region, (Box, Span)) else file.spec(key).shape.numel())
            * file.spec(key).dtype.itemsize
            for key, region in file.parts[before:]
        )
        stored = sum(file.spec(key).shape.numel() * file.spec(key).dtype.itemsize for key in file.keys())
        found[name] = {"weights": whole, "share": read / stored}
    return found


def test_each_rank_reads_half_and_all_hold_what_one_device_holds(tmp_path: Path) -> None:
    paths = write(tmp_path)
    expected = {}
    for name, path in paths.items():
        with deferred_init():
            model = Model(SHAPES[name])
        materialize(model, checkpoint=path, convert=[Dequantize()])
        expected[name] = weights(model)
    for rank in run_ranks(2, on_ranks, paths=paths):
        for name, found in rank.items():
            assert_same(found["weights"], expected[name])
            assert found["share"] < 0.55, name
