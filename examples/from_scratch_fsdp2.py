"""Train a language model from scratch on FSDP2: no checkpoint, and no rank ever holds the whole model.

    python from_scratch_fsdp2.py                                     # all devices of this machine
    python from_scratch_fsdp2.py --accelerator cpu --devices 2       # two processes on the CPU
    torchrun --nproc_per_node 8 from_scratch_fsdp2.py --devices 8

In the block the model is only recorded; ``init_missing`` then runs its own init for each rank's shards. The weights
depend on the seed alone, not on how many ranks there are.
"""

import argparse
import math

import torch
from torch import nn

from fabric_init import Fabric

VOCABULARY, CONTEXT = 1000, 64


class LanguageModel(nn.Module):
    """A small GPT, initialized as GPT-2 is."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(hidden))


parser = argparse.ArgumentParser()
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="auto")
parser.add_argument("--width", type=int, default=256)
parser.add_argument("--depth", type=int, default=6)
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="fsdp2")
fabric.launch()
fabric.seed_everything(0, verbose=False)

with fabric.init_module(empty_init=True):
    model = LanguageModel(options.width, options.depth)
model = fabric.setup(model)
fabric.init_missing(model)
fabric.print(str(fabric.init_report(model)).splitlines()[0])

optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
data = torch.Generator().manual_seed(fabric.global_rank)  # every rank has batches of its own
for step in range(options.steps):
    # Put your own data here. These sentences count on from a random token, in steps of one.
    batch = torch.randint(VOCABULARY, (8, 1), generator=data) + torch.arange(CONTEXT + 1)
    batch = (batch % VOCABULARY).to(fabric.device)
    logits = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step == 0:
        fabric.print(f"a model that knows nothing has a loss of ln({VOCABULARY}) = {math.log(VOCABULARY):.3f}")
    fabric.print(f"step {step}  loss {fabric.all_reduce(loss.detach()).item():.3f}")
