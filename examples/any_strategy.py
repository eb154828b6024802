"""One training script for every strategy: what ``--strategy`` names is all that differs.

    python any_strategy.py                                                       # one process on the CPU
    python any_strategy.py --strategy fsdp2 --accelerator cpu --devices 2
    python any_strategy.py --strategy model_parallel --accelerator cpu --devices 2
    DS_ACCELERATOR=cpu python any_strategy.py --strategy deepspeed_stage_3 --accelerator cpu --devices 2

The body of the model comes from a checkpoint, which the script writes first; the head is new.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import Fabric
from fabric_init.strategies import (
    DeepSpeedStrategy,
    DeferredInitMixin,
    FSDP2Strategy,
    FSDPStrategy,
    ModelParallelStrategy,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Regression(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def split_blocks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel: each rank keeps some of the units between ``up`` and ``down``."""
    for block in model.blocks:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def strategy(name: str) -> str | DeferredInitMixin:
    """The names alone would do for most; the classes take options."""
    if name == "fsdp2":
        return FSDP2Strategy(units="blocks", reshard_after_forward=True)
    if name == "model_parallel":
        return ModelParallelStrategy(split_blocks, data_parallel_size=1)
    if name == "fsdp":
        return FSDPStrategy(auto_wrap_policy={Block})
    if name.startswith("deepspeed_stage_"):
        return DeepSpeedStrategy(stage=int(name[-1]))
    return name


parser = argparse.ArgumentParser()
parser.add_argument("--strategy", default="auto", help="auto, ddp, fsdp2, model_parallel, fsdp, deepspeed_stage_1 to 3")
parser.add_argument("--accelerator", default="cpu")
parser.add_argument("--devices", default="1")
parser.add_argument("--steps", type=int, default=4)
options = parser.parse_args()

fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy(options.strategy))
fabric.launch()
fabric.seed_everything(0, verbose=False)

checkpoint = Path("body.safetensors")
if fabric.global_rank == 0:
    trained = Regression().state_dict()
    save_file({name: value for name, value in trained.items() if name.startswith("blocks.")}, checkpoint)
fabric.barrier()

with fabric.init_module(checkpoint=checkpoint, reinit=["head.*"]):
    model = Regression()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
model, optimizer = fabric.setup(model, optimizer)
fabric.print(str(fabric.init_report(model)).splitlines()[0])

# Ranks that split one model between them need the same batch, all others batches of their own.
data = torch.Generator().manual_seed(0 if options.strategy == "model_parallel" else fabric.global_rank)
for step in range(options.steps):
    x = torch.randn(16, 32, generator=data).to(fabric.device)
    loss = nn.functional.mse_loss(model(x), x[:, :1])
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}  loss {loss.item():.3f}")
