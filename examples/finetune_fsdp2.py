"""Finetune all of a causal language model on FSDP2, in bf16, with gradient accumulation; stop and go on as you like.

    python finetune_fsdp2.py --checkpoint Llama-3.2-1B/              # a folder in Hugging Face layout, all devices
    python finetune_fsdp2.py --checkpoint Llama-3.2-1B/ --resume finetuned/step-4
    python finetune_fsdp2.py --demo --accelerator cpu --devices 2    # a tiny model that it makes by itself
    torchrun --nproc_per_node 8 finetune_fsdp2.py --checkpoint Llama-3.2-1B/ --devices 8

Each rank reads its own part of every weight from the files, cast on the way. Needs transformers.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fabric_init import Fabric

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, default=Path("tiny-llama"), help="config.json and safetensors files")
parser.add_argument("--demo", action="store_true", help="write a tiny checkpoint there first")
parser.add_argument("--out", type=Path, default=Path("finetuned"), help="a folder for what is saved")
parser.add_argument("--resume", type=Path, help="what an earlier run has saved")
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="auto")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--accumulate", type=int, default=2, help="batches a step")
options = parser.parse_args()

fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="fsdp2", precision="bf16-true")
fabric.launch()
fabric.seed_everything(0, verbose=False)

if options.demo and fabric.global_rank == 0 and not options.checkpoint.exists():
    tiny = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(tiny).save_pretrained(options.checkpoint)
fabric.barrier()

config = AutoConfig.from_pretrained(options.checkpoint)
# What is resumed has all weights in it: the checkpoint's would be read in vain.
source = {"empty_init": True} if options.resume else {"checkpoint": options.checkpoint}
with fabric.init_module(**source):
    model = AutoModelForCausalLM.from_config(config)
model = fabric.setup(model)
optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))

state = {"model": model, "optimizer": optimizer, "step": 0}
if options.resume:
    fabric.load(options.resume, state)
fabric.print(str(fabric.init_report(model)).splitlines()[0])


def batch(number: int) -> torch.Tensor:
    """Put your own data here: token ids, one sentence a row. These count on from a random token."""
    generator = torch.Generator().manual_seed(number * fabric.world_size + fabric.global_rank)
    tokens = torch.randint(config.vocab_size, (4, 1), generator=generator) + torch.arange(32)
    return (tokens % config.vocab_size).to(fabric.device)


model.train()
for step in range(state["step"], state["step"] + options.steps):
    for part in range(options.accumulate):
        with fabric.no_backward_sync(model, enabled=part < options.accumulate - 1):
            tokens = batch(step * options.accumulate + part)
            loss = model(input_ids=tokens, labels=tokens).loss
            fabric.backward(loss / options.accumulate)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}  loss {fabric.all_reduce(loss.detach()).item():.3f}")

state["step"] += options.steps
saved = options.out / f"step-{state['step']}"
fabric.save(saved, state)
fabric.print(f"go on with --resume {saved}")
