"""Parts and conversions on several ranks: the same weights as on one device, and no element is read in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import deferred_init, materialize
from fabric_init.checkpoints import Box, Fuse, Layers, Part, Span, Split, Stack, Transpose, Unstack
from tests.support.ranks import run_ranks, run_ranks_each, try_ranks
from tests.support.watched import watched
from tests.support.zoo import IN_FOURS, IN_PAIRS, STRATEGIES, assert_same, launch, weights

WIDTH, QUERIES, KEYS, EXPERTS = 5, 7, 3, 3


class JoinedBlock(nn.Module):
    """No dimension divides evenly by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, QUERIES + 2 * KEYS)
        self.up = nn.Linear(WIDTH, 7)
        self.experts = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, 3))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(3, WIDTH, bias=False), nn.Linear(3, WIDTH, bias=False)


class ApartBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, QUERIES), nn.Linear(WIDTH, KEYS), nn.Linear(WIDTH, KEYS)
        self.up = nn.Module()
        self.up.weight = nn.Parameter(torch.randn(WIDTH, 7))
        self.up.bias = nn.Parameter(torch.randn(7))
        self.expert = nn.ModuleList(Expert() for _ in range(EXPERTS))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(depth))


BLOCKS: dict[str, type[nn.Module]] = {"joined": JoinedBlock, "apart": ApartBlock}
CONVERSIONS: dict[str, list[Any]] = {
    "joined": [
        Fuse(["q.{}", "k.{}", "v.{}"], into="qkv.{}"),
        Transpose(["up.weight"]),
        Fuse(["expert.{}.w1.weight", "expert.{}.w3.weight"], into="expert.{}.both"),
        Stack("expert.{}.both", into="experts"),
    ],
    "apart": [
        Split("qkv.{}", into=["q.{}", "k.{}", "v.{}"], sizes=[QUERIES, KEYS, KEYS]),
        Transpose(["up.weight"]),
        Unstack("experts", into="expert.{}.both"),
        Split("expert.{}.both", into=["expert.{}.w1.weight", "expert.{}.w3.weight"]),
    ],
}
both_ways = pytest.mark.parametrize("into", ["joined", "apart"])
RENAME = [Part("model."), Layers([0, 3])]
"""The checkpoint has a head as well, and four layers."""


def write(path: Path, into: str) -> Path:
    block = BLOCKS["apart" if into == "joined" else "joined"]
    torch.manual_seed(3)
    state = {f"model.{name}": tensor for name, tensor in Model(block, depth=4).state_dict().items()}
    save_file(state | {"head.weight": torch.randn(1000, WIDTH)}, path)
    return path


def load(strategy: str, into: str, io: str, path: Path) -> dict[str, Any]:
    opened = watched()
    fabric = launch(strategy, io=io)
    with fabric.init_module(checkpoint=path, convert=CONVERSIONS[into], rename=RENAME):
        model = Model(BLOCKS[into])
    read_before = len(opened[0].parts) if opened else 0  # a sample, to see that all ranks have the same file
    model = fabric.setup(model)
    found = weights(model)
    elements, keys = 0, set()
    for key, region in opened[0].parts[read_before:] if opened else ():
        keys.add(key)
        assert isinstance(region, (Box, Span)) or strategy != "fsdp2"
        elements += opened[0].spec(key).shape.numel() if region is None else region.numel
    return {"weights": found, "elements": elements, "keys": keys}


def expected(into: str, path: Path) -> dict[str, Tensor]:
    with deferred_init():
        model = Model(BLOCKS[into])
    materialize(model, checkpoint=path, convert=CONVERSIONS[into], rename=RENAME)
    return weights(model)


@pytest.mark.sweep(*IN_PAIRS, *IN_FOURS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_holds_what_one_device_holds(strategy: str, world_size: int, tmp_path: Path) -> None:
    paths = {into: write(tmp_path / f"{into}.safetensors", into) for into in BLOCKS}
    cases = {
        (into, io): {"into": into, "io": io, "path": paths[into]} for into in BLOCKS for io in ("local", "broadcast")
    }
    for (into, _), ranks in run_ranks_each(world_size, load, cases, strategy=strategy).items():
        for rank in ranks:
            assert_same(rank["weights"], expected(into, paths[into]))


@both_ways
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_stage_3"])
def test_ranks_with_shards_read_each_element_of_the_part_once_in_all(
    strategy: str, world_size: int, into: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.safetensors", into)
    found = run_ranks(world_size, load, strategy=strategy, into=into, io="local", path=path)
    assert sum(rank["elements"] for rank in found) == sum(value.numel() for value in expected(into, path).values())
    for key in set().union(*(rank["keys"] for rank in found)):
        assert key.startswith(("model.embedding.", "model.layers.0.", "model.layers.3."))


def load_wrongly(io: str, path: Path) -> None:
    fabric = launch("fsdp2", io=io)
    with fabric.init_module(checkpoint=path, convert=[Fuse(["q.{}", "gone.{}"], into="qkv.{}")]):
        Model(JoinedBlock)


@pytest.mark.parametrize("io", ["local", "broadcast"])
def test_a_conversion_that_does_not_fit_is_an_error_on_every_rank(io: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "joined")
    for outcome in try_ranks(2, load_wrongly, io=io, path=path):
        assert "no key ends in 'gone.{}'" in outcome.error
