"""Finetune all of a causal language model with DeepSpeed's ZeRO-3: weights, gradients and optimizer are sharded.

    python zero3.py --checkpoint Llama-3.2-1B/                                  # a folder in Hugging Face layout
    DS_ACCELERATOR=cpu python zero3.py --demo --accelerator cpu --devices 2     # a tiny model that it makes by itself
    torchrun --nproc_per_node 8 zero3.py --checkpoint Llama-3.2-1B/ --devices 8

Nothing is built under ``deepspeed.zero.Init``: each rank reads its own slice of every weight from the files. Needs
transformers and the deepspeed extra, ``pip install "fabric-init[deepspeed]"``.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fabric_init import Fabric

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, default=Path("tiny-llama"), help="config.json and safetensors files")
parser.add_argument("--demo", action="store_true", help="write a tiny checkpoint there first")
parser.add_argument("--out", type=Path, default=Path("finetuned"), help="where to save to")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="auto")
parser.add_argument("--steps", type=int, default=4)
options = parser.parse_args()

fabric = Fabric(
    accelerator=options.accelerator, devices=options.devices, strategy="deepspeed_stage_3", precision="bf16-true"
)
fabric.launch()
fabric.seed_everything(0, verbose=False)

if options.demo and fabric.global_rank == 0 and not options.checkpoint.exists():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny = LlamaConfig(vocab_size=128, **sizes)
    AutoModelForCausalLM.from_config(tiny).save_pretrained(options.checkpoint)
fabric.barrier()

config = AutoConfig.from_pretrained(options.checkpoint)
with fabric.init_module(checkpoint=options.checkpoint):
    model = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer = fabric.setup(model, optimizer)
fabric.print(str(fabric.init_report(model)).splitlines()[0])

model.train()
data = torch.Generator().manual_seed(fabric.global_rank)  # every rank has batches of its own
for step in range(options.steps):
    # Put your own data here: token ids, one sentence a row. These count on from a random token.
    tokens = torch.randint(config.vocab_size, (4, 1), generator=data) + torch.arange(32)
    tokens = (tokens % config.vocab_size).to(fabric.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}  loss {fabric.all_reduce(loss.detach()).item():.3f}")

fabric.save(options.out, {"model": model, "optimizer": optimizer})
fabric.print(f"saved to {options.out}")
