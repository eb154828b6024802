"""Finetune LoRA adapters over a base that bitsandbytes keeps in 4 bits (QLoRA), on one device or sharded by FSDP2.

    python qlora.py --demo                                        # a tiny base that it makes by itself, on the CPU
    torchrun --nproc-per-node=2 qlora.py --demo                    # two ranks of FSDP2
    python qlora.py --checkpoint model.safetensors --device cuda

The base is built with layers of bitsandbytes and read from a checkpoint of floats: one weight after the other is read,
quantized on its device, and freed. Each rank keeps its part of the packed weights. Needs bitsandbytes and peft.
"""

import argparse
import os
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import fabric_init

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, default=Path("tiny-base.safetensors"), help="float weights of the base")
parser.add_argument("--demo", action="store_true", help="write a tiny checkpoint there first")
parser.add_argument("--device", default="cpu")
parser.add_argument("--steps", type=int, default=12)
options = parser.parse_args()
VOCABULARY, WIDTH, LAYERS = 128, 64, 2


class Block(nn.Module):
    def __init__(self, linear: type[nn.Linear], **quantized) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = linear(WIDTH, 4 * WIDTH, **quantized)
        self.down = linear(4 * WIDTH, WIDTH, **quantized)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """A token says which one comes next. Put your own model here."""

    def __init__(self, linear: type[nn.Linear] = nn.Linear, **quantized) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block(linear, **quantized) for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.is_loaded_in_4bit = True  # what peft asks for; models of transformers have it

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
rank = int(os.environ.get("RANK", "0"))
torch.manual_seed(0)
if options.demo and rank == 0:
    save_file(Model().state_dict(), options.checkpoint)
if ranks > 1:
    dist.barrier()

with fabric_init.deferred_init():
    # FSDP2 gathers no integers: the packed bytes are kept as floats, of the dtype of the other parameters.
    base = Model(bnb.nn.LinearNF4, compute_dtype=torch.float32, quant_storage=torch.float32)
    base.to(options.device)  # quantizes: recorded, as all of this is
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["up", "down"]))
if ranks > 1:
    for block in base.blocks:
        fully_shard(block)
    fully_shard(model)
names = {r"^(.*\.)?(up|down)\.": r"base_model.model.\1\2.base_layer.", r"^(?!base_model)": "base_model.model."}
report = fabric_init.materialize(model, checkpoint=options.checkpoint, rename=names, strict=False)
if rank == 0:
    print(str(report).splitlines()[0])

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
generator = torch.Generator().manual_seed(rank)
for step in range(options.steps):
    tokens = torch.randint(VOCABULARY, (512,), generator=generator).to(options.device)
    loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % VOCABULARY)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}  loss {loss.item():.3f}")
if ranks > 1:
    dist.destroy_process_group()
