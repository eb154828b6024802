"""Folders of ``torch.distributed.checkpoint``, written by torch and by Lightning, alone or on ranks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


class Model(nn.Module):
    """Nothing divides evenly; one tensor is shorter than the ranks are many, one is empty, dtypes differ."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 1)
        self.mix = nn.Parameter(torch.empty(3, 7, 5))
        self.small = nn.Parameter(torch.empty(9, 3, dtype=torch.bfloat16), requires_grad=False)
        self.nothing = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.register_buffer("mean", torch.empty(7))
        self.register_buffer("count", torch.tensor(3))
        with torch.no_grad():
            for tensor in (*self.parameters(), self.mean):
                tensor.copy_(torch.rand(tensor.shape, generator=generator))

    def forward(self, rows: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(rows)) - self.mean
        return self.second(hidden).sum() + self.mix.sum()


def save_alone(content: dict[str, Any], folder: Path, **options: Any) -> Path:
    """In a single process, through a ``FileSystemWriter`` with these ``options``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it assumes just that
        dcp.save(content, storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


# -- in the ranks ------------------------------------------------------------------------------------------------------


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict put together from all ranks."""
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for key, value in state.items()
    }


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that has state: two steps were made."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(2):
        model(torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def save_fsdp2(folder: Path) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    model = Model()
    fully_shard(model)
    optimizer = trained(model)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer), "step": 2}
    dcp.save({"app": state}, checkpoint_id=folder)
    return whole(model.state_dict())


def grid() -> dict[str, tuple[Tensor, tuple[Any, Any]]]:
    """What is saved from a 2 x 2 mesh, and how it is laid out on it."""
    numbers = torch.arange(7.0 * 9 * 4).reshape(7, 9, 4)
    return {
        "rows and columns": (numbers, (Shard(0), Shard(1))),
        "columns and rows": (numbers, (Shard(2), Shard(0))),
        "rows": (numbers[0], (Shard(0), Replicate())),
        "columns": (numbers[:, 0], (Replicate(), Shard(1))),
        "rows twice": (numbers, (Shard(0), Shard(0))),
        "everywhere": (numbers[1], (Replicate(), Replicate())),
        "short": (numbers[:1, :1, :3], (Shard(0), Shard(2))),
        "half": (numbers.bfloat16(), (Shard(0), Shard(1))),
    }


def save_grid(folder: Path) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    state = {key: distribute_tensor(value, mesh, layout) for key, (value, layout) in grid().items()}
    dcp.save(state, checkpoint_id=folder)
    return {key: value for key, (value, _) in grid().items()}


def save_with_lightning(folder: Path, name: str) -> dict[str, Tensor]:
    world_size = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(
        lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]),
        data_parallel_size=world_size,
        tensor_parallel_size=1,
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    model = fabric.setup(Model())
    optimizer = trained(model)
    fabric.save(folder, {name: model, "optimizer": optimizer, "step": 2, "harmless": {"lr": torch.tensor(0.1)}})
    return whole(model.module.state_dict())
