"""A user's script, for every launcher: build from a checkpoint, train, and write down what came of it.

    python launched.py CHECKPOINT FOLDER --strategy fsdp2 --devices 2

Every rank trains on the same batches. The mean of equal gradients is that gradient to the bit, so that the trained
weights can be compared with those of one device.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from fabric_init import Fabric
from tests.support.zoo import Transformerish, loss_of, tokens, weights

STEPS = 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric | None = None) -> list[Tensor]:
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, tokens(step))
        loss.backward() if fabric is None else fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def main() -> None:
    faulthandler.dump_traceback_later(60)  # a rank that hangs says where, before the test kills it
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--failing", type=int, help="the rank that shall not come through")
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=options.devices, num_nodes=options.num_nodes, strategy=options.strategy)
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched already, and Lightning wants no second time
        fabric.launch()
    train_and_write(fabric, options)
    # DistributedDataParallel holds the process group from C++, and as its last holder it would wait, with the GIL, for
    # a thread of Gloo's that may want the GIL to let go of a tensor (pytorch/pytorch#56297): it goes first.
    gc.collect()
    # A machine whose last process has ended takes its network with it: nobody may still wait to hear from it.
    fabric.barrier()
    torch.distributed.destroy_process_group()


def train_and_write(fabric: Fabric, options: argparse.Namespace) -> None:
    fabric.seed_everything(1, verbose=False)
    with fabric.init_module(checkpoint=options.checkpoint, strict=False):
        model = Transformerish()
        if fabric.global_rank == options.failing:
            raise LookupError("the user's own mistake")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = fabric.setup(model, optimizer)
    assert isinstance(model, _FabricModule)
    found = {
        "strategy": type(fabric.strategy).__name__,
        "world size": fabric.world_size,
        "node rank": fabric.node_rank,
        "network": os.readlink("/proc/self/ns/net") if sys.platform == "linux" else "",
        "before": weights(model),
        "losses": train(model, optimizer, fabric),
        "after": weights(model),
    }
    torch.save(found, options.folder / f"rank {fabric.global_rank}.pt")


if __name__ == "__main__":
    main()
