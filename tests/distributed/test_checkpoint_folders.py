"""Folders that sharded strategies save, loaded by others: any number of ranks wrote them, any number read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from fabric_init import CheckpointError, deferred_init, init_report, materialize
from tests.support.ranks import run_ranks
from tests.support.zoo import (
    MODELS,
    assert_same,
    build,
    inner,
    launch,
    loss_of,
    one_device,
    tokens,
    weights,
    whole,
    write_checkpoint,
)

NAMES = ["uneven", "transformerish", "buffers"]


def filled(name: str, source: Path) -> nn.Module:
    """A model in plain PyTorch, with values that no init would give."""
    model = MODELS[name]()
    model.load_state_dict(torch.load(source, weights_only=True))
    return model


def save_dcp(folder: Path, name: str, source: Path) -> None:
    dist.init_process_group("gloo")
    model = filled(name, source)
    fully_shard(model)
    dcp.save({"model": get_model_state_dict(model), "step": 3}, checkpoint_id=folder)


def save_with_lightning(folder: Path, name: str, source: Path) -> dict[str, Tensor]:
    world_size = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(
        lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]),
        data_parallel_size=world_size,
        tensor_parallel_size=1,
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    model = fabric.setup(filled(name, source))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    fabric.backward(loss_of(model, tokens(fabric.global_rank)))
    optimizer.step()
    fabric.save(folder, {"net": model, "optimizer": optimizer, "step": 1})
    return {key: whole(value) for key, value in inner(model).state_dict().items()}


def load(strategy: str, name: str, **options: Any) -> dict[str, Any]:
    fabric = launch(strategy)
    model = fabric.setup(build(fabric, name, **options))
    report = fabric.init_report(model)
    return {"weights": weights(model), "note": report.note, "statuses": {row.status for row in report.rows}}


def check(folder: Path, name: str, expected: dict[str, Tensor], note: str, world_size: int, strategy: str) -> None:
    with deferred_init():
        model = MODELS[name]()
    materialize(model, device="cpu", checkpoint=folder)
    assert_same({key: value.detach() for key, value in model.state_dict().items()}, expected)
    assert note in str(init_report(model))
    with_the_rest = weights(model)  # buffers that are not saved
    for rank in run_ranks(world_size, load, strategy=strategy, name=name, checkpoint=folder):
        assert_same(rank["weights"], with_the_rest)
        assert "loaded" in rank["statuses"]
        assert note in rank["note"]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_distributed_checkpoint_fills_a_model(name: str, strategy: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source.pt", name)
    run_ranks(3, save_dcp, folder=tmp_path / "folder", name=name, source=source)
    expected = torch.load(source, weights_only=True)
    check(tmp_path / "folder", name, expected, "state dict found under 'model'", 2, strategy)


@pytest.mark.parametrize("written_by", [2, 4])
def test_a_folder_that_lightning_saved_after_training_fills_a_model(written_by: int, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source.pt", "uneven")
    expected = run_ranks(written_by, save_with_lightning, folder=tmp_path / "folder", name="uneven", source=source)[0]
    assert (tmp_path / "folder" / "meta.pt").exists()
    assert any(not torch.equal(value, expected[key]) for key, value in torch.load(source).items()), "it was trained"
    check(tmp_path / "folder", "uneven", expected, "state dict found under 'net'", 2, "fsdp2")


def test_a_single_file_of_fabric_save_fills_a_model(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(filled("uneven", write_checkpoint(tmp_path / "source.pt", "uneven")))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    fabric.backward(loss_of(model, tokens(0)))
    optimizer.step()
    fabric.save(tmp_path / "run.ckpt", {"net": model, "optimizer": optimizer, "step": 1})
    loaded = one_device("uneven", checkpoint=tmp_path / "run.ckpt")
    assert_same(weights(loaded), weights(model))


def test_of_two_models_in_one_file_each_can_be_asked_for(tmp_path: Path) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    models = {"generator": MODELS["uneven"](), "critic": MODELS["transformerish"]()}
    fabric.save(tmp_path / "gan.ckpt", {key: fabric.setup(model) for key, model in models.items()})
    with pytest.raises(CheckpointError, match="entry='generator'"):
        one_device("uneven", checkpoint=tmp_path / "gan.ckpt")
    loaded = one_device("uneven", checkpoint=tmp_path / "gan.ckpt", entry="generator")
    assert_same(weights(loaded), weights(models["generator"]))
    for rank in run_ranks(
        2, load, strategy="fsdp2", name="transformerish", checkpoint=tmp_path / "gan.ckpt", entry="critic"
    ):
        assert_same(rank["weights"], weights(models["critic"]))


def missing_on_one(name: str, folder: Path) -> str:
    fabric = launch("fsdp2")
    mine = folder if fabric.global_rank == 0 else folder.parent / "without a file"
    with pytest.raises(Exception, match=r"__0_0\.distcp") as caught:
        fabric.setup(build(fabric, name, checkpoint=mine))
    return str(caught.value)


def test_a_file_that_is_missing_on_one_rank_is_known_to_all(tmp_path: Path) -> None:
    import shutil

    source = write_checkpoint(tmp_path / "source.pt", "uneven")
    run_ranks(2, save_dcp, folder=tmp_path / "folder", name="uneven", source=source)
    shutil.copytree(tmp_path / "folder", tmp_path / "without a file")
    (tmp_path / "without a file" / "__0_0.distcp").unlink()
    for message in run_ranks(2, missing_on_one, name="uneven", folder=tmp_path / "folder"):
        assert "there is no such file" in message
