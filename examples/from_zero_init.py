"""``deepspeed.zero.Init`` and fabric_init side by side: a constructor that writes to a weight it has made.

    DS_ACCELERATOR=cpu python from_zero_init.py
    DS_ACCELERATOR=cpu python from_zero_init.py --devices 2

Needs the deepspeed extra, ``pip install "fabric-init[deepspeed]"``.
"""

import argparse

import deepspeed
import torch
from torch import Tensor, nn

from fabric_init import Fabric


class Classifier(nn.Module):
    """Sets its head to small values, after it made it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 2)
        nn.init.normal_(self.head.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


parser = argparse.ArgumentParser()
parser.add_argument("--accelerator", default="cpu")
parser.add_argument("--devices", default="1")
options = parser.parse_args()

fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="deepspeed_stage_3")
fabric.launch()


def std_of_head(model: nn.Module) -> float:
    """Of the whole weight, of which each rank keeps a slice."""
    with deepspeed.zero.GatheredParameters(model.head.weight):
        return model.head.weight.std().item()


# deepspeed.zero.Init: each layer is sharded as soon as it is made. normal_ finds nothing to write to.
torch.manual_seed(0)
with deepspeed.zero.Init():
    theirs = Classifier()
fabric.print(f"zero.Init    std of head.weight {std_of_head(theirs):.4f}")

# fabric_init: the constructor is recorded, and the rule that has the last word fills each rank's slice.
torch.manual_seed(0)
with fabric.init_module(empty_init=True):
    ours = Classifier()
fabric.init_missing(ours)
optimizer = torch.optim.AdamW(ours.parameters())
ours, optimizer = fabric.setup(ours, optimizer)
fabric.print(f"fabric_init  std of head.weight {std_of_head(ours.module):.4f}")
fabric.print(fabric.init_report(ours))
