"""What the tests of all schemes share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fabric_init.checkpoints import Box, CheckpointReader, Dequantize, Region, Span, open_checkpoint, take
from fabric_init.planning.recorded_load.converted import converted

Open = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None], CheckpointReader]


@pytest.fixture
def dequantized(tmp_path: Path) -> Open:
    """Saves a state dict, beside a config.json if there is one, and opens it with ``Dequantize()``."""

    def opened(state: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> CheckpointReader:
        save_file({key: value.contiguous().clone() for key, value in state.items()}, tmp_path / "model.safetensors")
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
        return converted(open_checkpoint(tmp_path), [Dequantize()])

    return opened


def assert_reads(reader: CheckpointReader, key: str, expected: Tensor) -> None:
    """Whole, and in parts that begin and end anywhere, these are the bits."""
    shape = tuple(expected.shape)
    assert (reader.spec(key).shape, reader.spec(key).dtype) == (expected.shape, expected.dtype)
    numel = math.prod(shape)
    regions: list[Region | None] = [
        None,
        Span(0, 0),
        Span(numel // 3, numel - 5),
        Box((0,) * len(shape), (0, *shape[1:])),
    ]
    for first, count in ((0, 1), (1, shape[0] - 1), (shape[0] // 2, shape[0] - shape[0] // 2), (shape[0] - 1, 1)):
        regions.append(Box((first, *[0] * (len(shape) - 1)), (count, *shape[1:])))
        regions.append(Box((first, *[size // 3 for size in shape[1:]]), (count, *[size // 2 for size in shape[1:]])))
    for region in regions:
        found = reader.read(key, region)
        assert torch.equal(found, take(expected, region)), region
