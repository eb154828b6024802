"""Finetune LoRA or DoRA adapters over a frozen causal language model on FSDP2; what is saved is the adapters alone.

    python lora_fsdp2.py --checkpoint Llama-3.2-1B/              # a folder in Hugging Face layout, all devices
    python lora_fsdp2.py --checkpoint Llama-3.2-1B/ --dora
    python lora_fsdp2.py --demo --accelerator cpu --devices 2    # a tiny model that it makes by itself

The base comes from the checkpoint, each rank reads its own part of it; the adapters get peft's own init. Needs
transformers and peft.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fabric_init import Fabric

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, default=Path("tiny-llama"), help="config.json and safetensors files")
parser.add_argument("--demo", action="store_true", help="write a tiny checkpoint there first")
parser.add_argument("--out", type=Path, default=Path("adapters.pt"), help="where the adapters go")
parser.add_argument("--dora", action="store_true", help="DoRA: magnitudes beside the directions")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--accelerator", default="auto")
parser.add_argument("--devices", default="auto")
parser.add_argument("--steps", type=int, default=4)
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
with fabric.init_module(checkpoint=options.checkpoint):
    model = AutoModelForCausalLM.from_config(config)
lora = LoraConfig(r=options.rank, target_modules=["q_proj", "v_proj"], use_dora=options.dora)
with fabric.init_module(empty_init=True):  # a block of its own: here the names are no longer the checkpoint's
    model = get_peft_model(model, lora)
fabric.init_missing(model)
model = fabric.setup(model)
adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
optimizer = fabric.setup_optimizers(torch.optim.AdamW(adapters.values(), lr=1e-2))
fabric.print(str(fabric.init_report(model)).splitlines()[0])


def batch(number: int) -> torch.Tensor:
    """Put your own data here: token ids, one sentence a row. These count on from a random token."""
    generator = torch.Generator().manual_seed(number * fabric.world_size + fabric.global_rank)
    tokens = torch.randint(config.vocab_size, (4, 1), generator=generator) + torch.arange(32)
    return (tokens % config.vocab_size).to(fabric.device)


model.train()
for step in range(options.steps):
    tokens = batch(step)
    loss = model(input_ids=tokens, labels=tokens).loss
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}  loss {fabric.all_reduce(loss.detach()).item():.3f}")

# Every rank takes part in putting them together; they are small.
state = {
    name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
    for name, value in adapters.items()
}
if fabric.global_rank == 0:
    torch.save(state, options.out)
fabric.print(f"{len(state)} adapter tensors in {options.out}")
