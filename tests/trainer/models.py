"""A ``LightningModule`` for the tests of the Trainer, what it is loaded from, and Trainers without output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader


class Net(nn.Module):
    """Inits of its own, a buffer that is saved and one that is not, both computed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        nn.init.normal_(self.head.weight, std=0.02)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 3))
        self.register_buffer("shift", torch.arange(3.0) / 8, persistent=False)
        self.register_buffer("gain", torch.tensor(0.25), persistent=False)  # a constant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x)) * self.scale + self.shift
        return out


class Module(LightningModule):
    """Builds its network in ``configure_model``.

    Args:
        change: What is done with the network there: Lightning's own way to load it, or ``shard``.
        block: The context in which it is built there.
    """

    def __init__(
        self, *change: Callable[[Module], None], block: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        super().__init__()
        self.net: Any = None
        self.change = change
        self.block = block

    def configure_model(self) -> None:
        if self.net is None:
            with self.block():
                self.net = Net()
            for change in self.change:
                change(self)

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - 1).pow(2).mean()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, _: int) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        out: Tensor = self.net(batch)
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Early(Module):
    """Builds its network in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


def shard(module: Module) -> None:
    """What ``configure_model`` does with ``ModelParallelStrategy``."""
    mesh = module.device_mesh
    assert mesh is not None
    for part in module.net.body:
        fully_shard(part, mesh=mesh["data_parallel"])
    fully_shard(module.net, mesh=mesh["data_parallel"])


class LoadEagerly:
    """Lightning's own way: the weights are loaded into a network that was built with values."""

    def __init__(self, path: Path, strict: bool = True) -> None:
        self.path, self.strict = path, strict

    def __call__(self, module: Module) -> None:
        module.net.load_state_dict(torch.load(self.path), strict=self.strict)


def data() -> DataLoader[Tensor]:
    return DataLoader(torch.arange(48.0).view(12, 4) / 48, batch_size=2)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 3}
    return Trainer(callbacks=list(callbacks), **quiet | defaults | arguments)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, gathered where they are DTensors."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name.replace("_fsdp_wrapped_module.", ""): (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


class Start(Callback):
    """Remembers the weights with which training starts."""

    weights: dict[str, Tensor]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrapped = trainer.strategy.model
        gathered: Any = nullcontext()
        if isinstance(wrapped, FullyShardedDataParallel):
            gathered = FullyShardedDataParallel.summon_full_params(wrapped)
        with gathered:
            self.weights = weights(pl_module)


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not bit-equal, or are in one of them alone."""
    both = one.keys() & other.keys()
    return sorted((one.keys() ^ other.keys()) | {name for name in both if not torch.equal(one[name], other[name])})


def write(folder: Path) -> tuple[Path, Path]:
    """Write the weights of a network, and those without its head."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = Net().state_dict()
    whole, body = folder / "whole.pt", folder / "body.pt"
    torch.save(state, whole)
    torch.save({name: value for name, value in state.items() if not name.startswith("head")}, body)
    return whole, body
