"""Whatever format the weights are in, every strategy holds the same bits: all of them, or a part and the rest by init.

All formats are loaded one after the other by one group of ranks, as several models in one Fabric. Without ``--whole``
each model has its turn in one of the two ways.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.every_format import URLS, with_urls, write_alone, write_by_ranks
from tests.support.ranks import run_ranks
from tests.support.zoo import assert_same, build, launch, one_device, weights, write_checkpoint

MODELS = ["transformerish", "buffers", "cross_tied", "uneven, nothing empty"]


def load_all(strategy: str, name: str, paths: dict[str, Path], strict: bool) -> dict[str, dict[str, Tensor]]:
    fabric = launch(strategy)
    return {
        kind: weights(fabric.setup(build(fabric, name, checkpoint=path, strict=strict)))
        for kind, path in with_urls(paths).items()
    }


@pytest.mark.sweep("transformerish-partial", "buffers-full", "cross_tied-partial", "uneven, nothing empty-full")
@pytest.mark.parametrize("part", ["full", "partial"])
@pytest.mark.parametrize("name", MODELS)
def test_every_format_gives_the_same_bits_on_every_strategy(name: str, part: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source.pt", name, partial=part == "partial")
    state: dict[str, Tensor] = torch.load(source)
    paths = write_alone(state, tmp_path / "alone", name)
    paths |= run_ranks(2, write_by_ranks, source=source, folder=tmp_path / "ranks", name=name)[0]
    expected = weights(one_device(name)) | state
    strict = part == "full"
    found = {
        "one device": {
            kind: weights(one_device(name, checkpoint=path, strict=strict)) for kind, path in with_urls(paths).items()
        }
    }
    for strategy in ("fsdp2", "deepspeed_stage_3"):
        for rank, of_rank in enumerate(
            run_ranks(2, load_all, strategy=strategy, name=name, paths=paths, strict=strict)
        ):
            found[f"{strategy}, rank {rank}"] = of_rank
    for where, of_kinds in found.items():
        assert of_kinds.keys() == paths.keys() | URLS.keys()
        for kind, values in of_kinds.items():
            try:
                assert_same(values, expected)
            except AssertionError as error:
                raise AssertionError(f"{kind}, {part}, {where}: {error}") from error
