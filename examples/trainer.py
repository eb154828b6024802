"""Finetune under Lightning's Trainer: the body from a checkpoint, the new head by the model's own init.

python examples/trainer.py                                                   # one device
python examples/trainer.py --accelerator cpu --devices 2 --strategy ddp
python examples/trainer.py --accelerator cpu --devices 2 --strategy fsdp2    # each rank reads its own part
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from fabric_init import FillModel, init_report


class Classifier(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class Finetuning(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:  # the Trainer calls it for each of fit, validate, test and predict
            return
        self.net = Classifier(classes=4)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            fully_shard(self.net.body, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto", help="auto, ddp, fsdp2, deepspeed_stage_2")
    options = parser.parse_args()

    seed_everything(1)
    save_file(Classifier(classes=10).state_dict(), "pretrained.safetensors")
    strategy = options.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1)

    fill = FillModel("pretrained.safetensors", part="net", reinit=["head.*"])
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=strategy,
        callbacks=[fill],
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Finetuning()
    inputs = torch.randn(64, 8)
    trainer.fit(model, DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8))
    if trainer.is_global_zero:
        print(init_report(model.net))


if __name__ == "__main__":
    main()
