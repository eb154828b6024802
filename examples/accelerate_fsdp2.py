"""Finetune under accelerate: the body from a checkpoint, the new head by the model's own init.

python examples/accelerate_fsdp2.py                                                        # one device, here the CPU
accelerate launch --multi_gpu examples/accelerate_fsdp2.py                                 # DDP
accelerate launch --use_fsdp --fsdp_version=2 --fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP \\
    --fsdp_transformer_layer_cls_to_wrap=Block examples/accelerate_fsdp2.py                # each GPU reads its own part

The script is the same for all three. Needs accelerate.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import FillModel, deferred_init, init_report


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Classifier(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embedding(x)))
        return logits


def main() -> None:
    accelerator = FillModel("pretrained.safetensors", reinit=["head.*"]).attach(Accelerator())
    torch.manual_seed(1)
    if accelerator.is_main_process:
        save_file(Classifier(classes=10).state_dict(), "pretrained.safetensors")
    accelerator.wait_for_everyone()

    with deferred_init():
        model = Classifier(classes=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.print(init_report(accelerator.unwrap_model(model)))

    for step in range(3):
        inputs = torch.randn(8, 8, device=accelerator.device)
        loss = nn.functional.cross_entropy(model(inputs), inputs[:, :4].argmax(1))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.print(f"step {step}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
