"""Every rank holds what one device would hold, bit for bit, whatever the strategy and however many ranks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.support.ranks import run_ranks
from tests.support.zoo import (
    IN_FOURS,
    IN_PAIRS,
    LEFT_OUT,
    MODELS,
    NAMES,
    SHARDED,
    STRATEGIES,
    WHOLE_ON_EACH_RANK,
    assert_same,
    build,
    inner,
    launch,
    named,
    one_device,
    ties,
    weights,
    write_checkpoint,
)

in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
in_small_and_large_groups = pytest.mark.parametrize("world_size", [2, 4])


def load_declared(
    strategy: str, name: str, precision: str = "32-true", seed: int = 1, **options: Any
) -> dict[str, Any]:
    fabric = launch(strategy, precision)
    model = build(fabric, name, seed=seed, **options)
    if strategy in WHOLE_ON_EACH_RANK:
        assert not any(tensor.is_meta for tensor in model.parameters()), "filled when the block ends"
    model = fabric.setup(model)
    plain = [key for key, value in inner(model).named_parameters() if part_of(value) is value]
    sharded = sum(part_of(p).numel() for p in inner(model).parameters())
    return {
        "weights": weights(model),
        "ties": ties(model),
        "trained": {key for key, value in named(model, "named_parameters") if value.requires_grad},
        "statuses": {row.name: row.status for row in fabric.init_report(model).rows},
        "not sharded": plain if strategy in ("fsdp2", "deepspeed_stage_3") else [],
        "local elements": sharded,
    }


def load_every_model(strategy: str, folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """In one group of ranks: to start processes takes longer than what they do here."""
    return {name: load_declared(strategy, name, checkpoint=folder / f"{name}.safetensors", **options) for name in NAMES}


def part_of(parameter: Tensor) -> Tensor:
    """What this rank keeps of a parameter; ZeRO-3 pads it to the same size on each."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)


def check(found: list[dict[str, Any]], expected: nn.Module) -> None:
    for rank in found:
        assert_same(rank["weights"], weights(expected))
        assert rank["ties"] == ties(expected)
        assert rank["trained"] == {key for key, value in named(expected, "named_parameters") if value.requires_grad}
        assert rank["not sharded"] == []


@pytest.mark.sweep(*IN_PAIRS, *IN_FOURS)
@in_small_and_large_groups
@in_every_strategy
def test_a_checkpoint_fills_every_rank(strategy: str, world_size: int, tmp_path: Path) -> None:
    paths = {name: write_checkpoint(tmp_path / f"{name}.safetensors", name) for name in NAMES}
    ranks = run_ranks(world_size, load_every_model, strategy=strategy, folder=tmp_path)
    for name, path in paths.items():
        found = [rank[name] for rank in ranks]
        check(found, one_device(name, checkpoint=path))
        if strategy == "fsdp2":
            elements = sum(value.numel() for value in MODELS[name]().parameters())
            assert sum(rank["local elements"] for rank in found) == elements, "each element on one rank, and only there"


@pytest.mark.sweep(*IN_PAIRS, *IN_FOURS)
@in_small_and_large_groups
@in_every_strategy
def test_what_the_checkpoint_lacks_gets_the_models_own_init(strategy: str, world_size: int, tmp_path: Path) -> None:
    paths = {name: write_checkpoint(tmp_path / f"{name}.safetensors", name, partial=True) for name in NAMES}
    ranks = run_ranks(world_size, load_every_model, strategy=strategy, folder=tmp_path, strict=False)
    for name, path in paths.items():
        found = [rank[name] for rank in ranks]
        check(found, one_device(name, checkpoint=path, strict=False))
        for rank in found:
            initialized = {key for key, status in rank["statuses"].items() if status == "initialized"}
            assert initialized & set(LEFT_OUT[name])
            assert {status for key, status in rank["statuses"].items() if key in LEFT_OUT[name]} == {"initialized"}


@in_every_strategy
def test_a_torch_file_does_as_well(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.pt", "transformerish")
    found = run_ranks(2, load_declared, strategy=strategy, name="transformerish", checkpoint=path)
    check(found, one_device("transformerish", checkpoint=path))


@pytest.mark.parametrize("name", ["uneven", "buffers"])
@in_every_strategy
@pytest.mark.parametrize(
    ("saved", "precision", "kept"),
    [(torch.bfloat16, "32-true", torch.float32), (torch.float32, "bf16-true", torch.bfloat16)],
    ids=["bf16 into fp32", "fp32 into bf16"],
)
def test_dtypes_are_the_models(
    saved: torch.dtype, precision: str, kept: torch.dtype, strategy: str, name: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", name, dtype=saved, partial=True)
    found = run_ranks(
        2, load_declared, strategy=strategy, name=name, precision=precision, checkpoint=path, strict=False
    )
    check(found, one_device(name, dtype=kept, checkpoint=path, strict=False))


@in_every_strategy
def test_rename_and_reinit_reach_every_rank(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    options: dict[str, Any] = {"checkpoint": path, "rename": {"^second": "second"}, "reinit": ["first.*", "mix"]}
    found = run_ranks(2, load_declared, strategy=strategy, name="uneven", **options)
    check(found, one_device("uneven", **options))
    for rank in found:
        afresh = {key for key, status in rank["statuses"].items() if status == "initialized"}
        assert afresh == {"first.weight", "first.bias", "mix"}


# -- without a checkpoint ----------------------------------------------------------------------------------------------


def from_scratch(strategy: str, name: str, seeds: list[int], when: str) -> dict[str, Tensor]:
    fabric = launch(strategy)
    model = build(fabric, name, seed=seeds[fabric.global_rank], empty_init=True)
    if when == "before setup":
        fabric.init_missing(model)
    model = fabric.setup(model)
    if when == "after setup":
        fabric.init_missing(model)
    return weights(model)


def every_model_from_scratch(strategy: str, seeds: list[int]) -> dict[str, dict[str, Tensor]]:
    return {name: from_scratch(strategy, name, seeds, "after setup") for name in NAMES}


@pytest.mark.sweep(*IN_PAIRS, *(f"{strategy}-3" for strategy in SHARDED), "ddp-1", "fsdp2-1", "fsdp2-4")
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@in_every_strategy
def test_one_seed_gives_the_same_weights_everywhere(strategy: str, world_size: int) -> None:
    expected = {name: weights(one_device(name, seed=7)) for name in NAMES}
    for found in run_ranks(world_size, every_model_from_scratch, strategy=strategy, seeds=[7] * world_size):
        for name in NAMES:
            assert_same(found[name], expected[name])


@pytest.mark.parametrize("name", ["uneven", "transformerish"])
@in_every_strategy
def test_init_missing_may_come_before_setup(strategy: str, name: str) -> None:
    expected = weights(one_device(name, seed=7))
    for found in run_ranks(2, from_scratch, strategy=strategy, name=name, seeds=[7, 7], when="before setup"):
        assert_same(found, expected)


@in_every_strategy
def test_ranks_with_different_seeds_agree_on_that_of_rank_0(strategy: str) -> None:
    found = run_ranks(3, from_scratch, strategy=strategy, name="uneven", seeds=[5, 6, 7], when="after setup")
    for rank in found:
        assert_same(rank, weights(one_device("uneven", seed=5)))


def partly_with_seeds(strategy: str, path: Path, seeds: list[int]) -> dict[str, Tensor]:
    fabric = launch(strategy)
    seed = seeds[fabric.global_rank]
    return weights(fabric.setup(build(fabric, "buffers", seed=seed, checkpoint=path, strict=False)))


@in_every_strategy
def test_different_seeds_agree_for_missing_tensors_and_buffers_too(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "buffers", partial=True)
    for found in run_ranks(2, partly_with_seeds, strategy=strategy, path=path, seeds=[5, 6]):
        assert_same(found, weights(one_device("buffers", seed=5, checkpoint=path, strict=False)))


def keeps_its_own_stream(strategy: str, seeds: list[int]) -> tuple[int, int, float]:
    fabric = launch(strategy)
    rank_seed = seeds[fabric.global_rank]
    fabric.setup(build(fabric, "uneven", seed=rank_seed, empty_init=True))
    return rank_seed, torch.initial_seed(), torch.rand(()).item()


@in_every_strategy
def test_agreeing_on_a_seed_leaves_each_ranks_own_generator_alone(strategy: str) -> None:
    first, second = run_ranks(2, keeps_its_own_stream, strategy=strategy, seeds=[5, 6])
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[2] != second[2], "dropout masks of ranks would be equal"


def plain_fabric_eager(strategy: str, name: str) -> dict[str, Tensor]:
    fabric = launch(strategy)
    return weights(fabric.setup(build(fabric, name, seed=3)))


@in_every_strategy
def test_without_empty_init_it_is_plain_pytorch(strategy: str) -> None:
    torch.manual_seed(3)
    expected = weights(MODELS["transformerish"]())
    for found in run_ranks(2, plain_fabric_eager, strategy=strategy, name="transformerish"):
        assert_same(found, expected)
