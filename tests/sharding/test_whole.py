"""What is done to a sharded model before it has values: what counts, what changes nothing, what is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import FabricInitError, InitReport, UninitializedTensorError, deferred_init, materialize
from fabric_init.errors import RecordingError
from fabric_init.planning import checkpoint_source as source
from tests.sharding.ways import Model, Tied, Way, block_by_block, local_part, one_dimension, options, recorded_model
from tests.support.watched import watched

WORLD = 3


@pytest.fixture
def on_rank_one() -> Iterator[None]:
    """This process takes itself for rank 1 of 3."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return options("checkpoint", tmp_path, Way(block_by_block))["checkpoint"]


def sharded(shard: Callable[[nn.Module, int, int | None], None] = block_by_block) -> nn.Module:
    model = recorded_model(Way(shard))
    shard(model, WORLD, 0)
    return model


def fill(model: nn.Module, **arguments: Any) -> InitReport:
    return materialize(model, process_group=False, **arguments)


def filled(path: Path | None = None) -> dict[str, torch.Tensor]:
    """Return what this rank holds of a sharded model that nothing special was done to."""
    model = sharded()
    fill(model, checkpoint=path)
    return parts(model)


def parts(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name.replace("_checkpoint_wrapped_module.", ""): local_part(tensor.detach()) for name, tensor in tensors}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def doubled_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def other_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() - 1)


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("change", [doubled_data, other_parameter])
def test_what_a_parameter_was_replaced_by_before_sharding_is_sharded(
    change: Callable[[nn.Linear], None], is_loaded: bool, on_rank_one: None, path: Path
) -> None:
    whole, model = (recorded_model(Way(block_by_block)) for _ in range(2))
    fill(whole, checkpoint=path if is_loaded else None)
    if not is_loaded:
        change(whole.blocks[0].up)
    block_by_block(whole, WORLD, None)
    change(model.blocks[0].up)
    block_by_block(model, WORLD, None)
    fill(model, checkpoint=path if is_loaded else None)
    assert same(parts(model), parts(whole))


def scaled(weight: DTensor) -> None:
    weight.mul_(2)


def scaled_in_part(weight: DTensor) -> None:
    weight.to_local()[0].mul_(2)


@pytest.mark.parametrize("with_checkpoint", [True, False])
@pytest.mark.parametrize("change", [scaled, scaled_in_part])
def test_a_shard_that_was_changed_after_sharding_is_refused_by_name(
    change: Callable[[DTensor], None], with_checkpoint: bool, path: Path, on_rank_one: None
) -> None:
    model = sharded()
    with torch.no_grad():
        change(model.blocks[0].up.weight)
    with pytest.raises(RecordingError, match=r"the shard of blocks\.0\.up\.weight was changed"):
        fill(model, checkpoint=path if with_checkpoint else None)


def test_a_shard_that_was_written_whole_keeps_what_was_written(on_rank_one: None) -> None:
    model = sharded()
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(5)
    fill(model)
    wanted = filled()
    wanted["blocks.0.up.weight"].fill_(5)
    assert same(parts(model), wanted)


def test_a_load_does_not_undo_what_was_written_into_a_shard(path: Path, on_rank_one: None) -> None:
    model = sharded()
    with torch.no_grad():
        model.blocks[0].up.weight.fill_(5)
    with pytest.raises(RecordingError, match=r"blocks\.0\.up\.weight: written after the recorded block"):
        fill(model, checkpoint=path)


def test_a_tie_that_sharding_has_split_is_refused_by_name(on_rank_one: None) -> None:
    model, mesh = recorded_model(Way(block_by_block, Tied)), one_dimension(WORLD)
    for unit in (model.embedding, model.head, model):
        fully_shard(unit, mesh=mesh)
    with pytest.raises(FabricInitError, match=r"embedding\.weight and head\.weight are one tied tensor"):
        fill(model)


def test_load_code_that_replaces_a_parameter_of_a_sharded_model_is_refused_by_name(
    path: Path, on_rank_one: None
) -> None:
    def replace(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        module.weight = nn.Parameter(state[prefix + "weight"] * 2)

    model = sharded()
    before = dict(model.named_parameters())
    model.blocks[0].up.register_load_state_dict_pre_hook(replace)
    with pytest.raises(FabricInitError, match=r"blocks\.0\.up\.weight was sharded already, and the load code"):
        fill(model, checkpoint=path)
    assert all(found is before[name] for name, found in model.named_parameters())


class Renamed(Model):
    """Takes the name that its head had in older checkpoints, and halves what they hold."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        old = prefix + "old_head"
        if old in state:
            state[prefix + "head.weight"] = state.pop(old) / 2
        super()._load_from_state_dict(state, prefix, *arguments)


def test_load_code_runs_on_shards_as_on_whole_tensors(path: Path, tmp_path: Path, on_rank_one: None) -> None:
    wanted, state = filled(path), load_file(path)
    state["old_head"] = state.pop("head.weight") * 2
    save_file(state, tmp_path / "old.safetensors")
    model = recorded_model(Way(block_by_block, Renamed))
    block_by_block(model, WORLD, 0)
    fill(model, checkpoint=tmp_path / "old.safetensors")
    assert same(parts(model), wanted)


def add_more(model: nn.Module, device: str) -> None:
    values = torch.ones(6, device=device)
    model.more = nn.Parameter(distribute_tensor(values, one_dimension(WORLD), [Shard(0)], src_data_rank=None))


def test_a_dtensor_with_values_that_was_never_recorded_keeps_them(on_rank_one: None) -> None:
    model = sharded()
    add_more(model, "cpu")
    report = fill(model)
    assert model.more.to_local().tolist() == [1, 1]
    assert {row.name: row.status for row in report.rows}["more"] == "set when built"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dtensor_that_was_never_recorded_is_loaded(
    device: str, path: Path, tmp_path: Path, on_rank_one: None
) -> None:
    save_file(load_file(path) | {"more": torch.arange(6.0)}, tmp_path / "more.safetensors")
    model = sharded()
    add_more(model, device)
    fill(model, checkpoint=tmp_path / "more.safetensors")
    assert model.more.to_local().tolist() == [2, 3]


def test_a_dtensor_on_meta_that_was_never_recorded_is_refused_by_name(on_rank_one: None) -> None:
    model = sharded()
    add_more(model, "meta")
    with pytest.raises(UninitializedTensorError, match="more"):
        fill(model)


def test_a_partial_value_is_refused(on_rank_one: None) -> None:
    model = recorded_model(Way(block_by_block))
    model.extra = nn.Parameter(DTensor.from_local(model.extra, one_dimension(WORLD), [Partial()], run_check=False))
    with pytest.raises(FabricInitError, match="Partial"):
        fill(model)


def test_a_local_tensor_that_is_another_part_than_the_placement_says_is_refused_by_name(on_rank_one: None) -> None:
    model = recorded_model(Way(block_by_block))
    first = DTensor.from_local(model.extra[:1], one_dimension(WORLD), [Shard(0)], run_check=False)
    model.extra = nn.Parameter(first)  # rank 1 has the second
    with pytest.raises(RecordingError, match="extra"):
        fill(model)


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_to_empty_after_sharding_changes_nothing(with_checkpoint: bool, path: Path, on_rank_one: None) -> None:
    checkpoint = path if with_checkpoint else None
    model = sharded().to_empty(device="cpu")
    fill(model, checkpoint=checkpoint)
    assert same(parts(model), filled(checkpoint))


def test_activation_checkpointing_and_compile_go_together_with_sharding(path: Path, on_rank_one: None) -> None:
    model = recorded_model(Way(block_by_block))
    for index, block in enumerate(model.blocks):
        block.compile(backend="eager")
        model.blocks[index] = checkpoint_wrapper(block)
    block_by_block(model, WORLD, 0)
    fill(model, checkpoint=path)
    assert same(parts(model), filled(path))


def test_parameters_stay_the_same_objects(path: Path, on_rank_one: None) -> None:
    model = sharded()
    before = list(model.parameters())
    fill(model, checkpoint=path)
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_a_rank_reads_its_own_part_and_no_more(tmp_path: Path, on_rank_one: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(source, "open_checkpoint", source.open_checkpoint)  # taken back at the end
    opened = watched()
    with deferred_init():
        model = Model(48)
    state = {name: torch.ones(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    block_by_block(model, WORLD, 0)
    fill(model, checkpoint=tmp_path / "model.safetensors")
    (reader,) = opened
    read = sum(math.prod(region.sizes if region else state[key].shape) for key, region in reader.parts)
    kept = sum(local_part(model.state_dict()[name]).numel() for name in state)
    assert kept < sum(value.numel() for value in state.values()) / 2.8
    assert read <= 1.05 * kept


def test_a_sharded_model_that_has_its_values_may_be_loaded_again(path: Path, on_rank_one: None) -> None:
    model = sharded()
    fill(model)
    fill(model, checkpoint=path)
    assert same(parts(model), filled(path))


def test_fsdp1_around_a_recorded_model_is_refused_with_the_way_that_works(on_rank_one: None) -> None:
    model = FullyShardedDataParallel(recorded_model(Way(block_by_block)), device_id=torch.device("cpu"))
    with pytest.raises(FabricInitError, match=r"with fabric_init\.param_init_fn"):
        fill(model)
