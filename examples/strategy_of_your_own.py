"""A strategy of your own: weights in shared memory, trained by several processes at once without locks (Hogwild!).

Run it with ``python strategy_of_your_own.py``; it needs nothing but the package itself. The method is that of Niu et
al., "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient Descent" (2011).
"""

import tempfile
from pathlib import Path

import lightning
import torch
import torch.multiprocessing as mp
from lightning.fabric.strategies import SingleDeviceStrategy
from safetensors.torch import save_file
from torch import Tensor, nn

import fabric_init
from fabric_init.strategies import DeferredInitMixin, Placement, TensorInfo, WholeTensors, register_strategy


class InSharedMemory(WholeTensors):
    """Every tensor whole, where other processes can reach it."""

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        return super().put(slot, tensor, value.share_memory_())


class HogwildStrategy(DeferredInitMixin, SingleDeviceStrategy):
    """One device, whose models can be handed to other processes."""

    def placement(self, model: nn.Module) -> Placement:
        return InSharedMemory(self.root_device)


# From here on fabric_init.Fabric takes it wherever it meets a plain SingleDeviceStrategy, also where no strategy is
# named at all. An instance can be handed to either Fabric without this.
register_strategy(HogwildStrategy, instead_of=SingleDeviceStrategy)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.head = nn.Linear(32, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).squeeze(-1)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, 0] * x[:, 1]


def loss_of(model: nn.Module, seed: int = 12345) -> Tensor:
    x, y = batch(seed)
    return nn.functional.mse_loss(model(x), y)


def work(model: nn.Module, rank: int) -> None:
    """Train the model that all workers share."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        loss_of(model, seed=1000 * rank + step).backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        pretrained = {name: value for name, value in Regression().state_dict().items() if name.startswith("body")}
        save_file(pretrained, Path(folder, "body.safetensors"))

        # The same strategy in an unchanged lightning.Fabric: what has no values is guarded there, too.
        plain = lightning.Fabric(accelerator="cpu", strategy=HogwildStrategy(torch.device("cpu")))
        with plain.init_module(empty_init=True):
            waiting = Regression()
        fabric_init.init_missing(waiting)
        assert all(parameter.is_shared() for parameter in waiting.parameters())

        fabric = fabric_init.Fabric(accelerator="cpu", devices=1)
        with fabric.init_module(checkpoint=Path(folder, "body.safetensors"), strict=False):
            model = Regression()
        print(fabric.init_report(model))
        assert all(parameter.is_shared() for parameter in model.parameters())

    before = loss_of(model).item()
    mp.spawn(_worker, args=(model,), nprocs=2)
    after = loss_of(model).item()
    print(f"loss before {before:.3f}, after two workers trained the same weights {after:.3f}")
    assert after < before


def _worker(rank: int, model: nn.Module) -> None:
    work(model, rank)


if __name__ == "__main__":
    main()
