"""Run litgpt's flows with Lightning's Fabric and with ours, and print where losses, weights or texts differ::

    python -m tests.litgpt_flows.run CHECKOUT FOLDER [PATTERN …] [--model llama]

CHECKOUT is a clone of litgpt, whose dependencies are installed; FOLDER is made, and keeps all files. PATTERN selects
flows by name: `"full*"`, say. Each command is a process of its own, or two ranks over gloo. The exit status is 1 if a
flow comes to something else with ours, or fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
BATCHES = "--train.global_batch_size 2 --train.micro_batch_size 1 --train.lr_warmup_steps 1 --train.save_interval 2"
COMMON = f"--out_dir out --devices RANKS --precision 32-true {BATCHES} --eval.interval 2"
TUNE = f"CHECKPOINT {COMMON} --data JSON --data.json_path DATA --data.num_workers 0"
TUNE += " --eval.max_new_tokens 8 --train.max_steps 4"
PRETRAIN = f"pretrain pythia-14m --config CHECKPOINT/pretrain.yaml --tokenizer_dir CHECKPOINT {COMMON}"
PRETRAIN += " --data tests.litgpt_flows.files.RandomTokens --train.max_seq_length 32 --eval.max_iters 2"
PRETRAIN += " --logger_name csv --train.max_tokens 256"
SAY = "--max_new_tokens 8 --precision 32-true"
ADAPTED = f"CHECKPOINT {SAY} --adapter_path out/final/lit_model.pth."


class Flow(NamedTuple):
    """Commands in one folder, one after the other, with placeholders in capitals, and their variables."""

    commands: list[str]
    ranks: int = 1
    environment: str = ""


def training(ranks: int, environment: str) -> dict[str, Flow]:
    """Return the flows that train on so many ranks."""
    flows = {
        "lora": [f"finetune_lora {TUNE}", f"generate out/final {SAY}"],
        "lora_bfloat16": [f"finetune_lora {TUNE} --precision bf16-true"],
        "full": [f"finetune_full {TUNE}", f"finetune_full {TUNE} --train.max_steps 6 --resume true"],
        "adapter": [f"finetune_adapter {TUNE}", f"generate_adapter {ADAPTED}adapter"],
        "adapter_v2": [
            *(f"finetune_adapter_v2 {TUNE}", f"finetune_adapter_v2 {TUNE} --train.max_steps 6 --resume true"),
            f"generate_adapter_v2 {ADAPTED}adapter_v2",
        ],
        "pretrain": [PRETRAIN, f"{PRETRAIN} --resume true --train.max_tokens 384"],
        "continue": [f"{PRETRAIN} --initial_checkpoint_dir CHECKPOINT"],
    }
    return {f"{name}-{ranks}": Flow(commands, ranks, environment) for name, commands in flows.items()}


FLOWS = training(1, "") | training(2, "FLOW_CONSTANTS=1")
FLOWS |= {
    "pretrain-1": FLOWS["pretrain-1"]._replace(environment="FLOW_CONSTANTS=1"),
    "lora_legacy-2": Flow([f"finetune_lora {TUNE}"], 2, "FLOW_CONSTANTS=1 FLOW_LEGACY=1"),
    "lora_everywhere-1": Flow(
        [f"finetune_lora {TUNE} --lora_key true --lora_projection true --lora_mlp true --lora_head true"]
    ),
    "generate": Flow([f"generate CHECKPOINT {SAY}", f"chat CHECKPOINT {SAY}"]),
    "generate_full": Flow([f"generate_full CHECKPOINT --finetuned_path CHECKPOINT/lit_model.pth {SAY}"]),
    "generate_speculatively": Flow([f"generate_speculatively CHECKPOINT CHECKPOINT {SAY}"]),
    "generate_tp-1": Flow([f"generate_tp CHECKPOINT {SAY}"]),
    "generate_tp-2": Flow([f"generate_tp CHECKPOINT {SAY}"], 2, "LT_DEVICES=2"),
}


def run(flow: Flow, kind: str, folder: Path, checkpoint: Path, checkout: Path) -> str:
    """Run the commands of ``flow`` in ``folder``, and return how the first that failed did so."""
    folder.mkdir(parents=True)
    path = os.pathsep.join(map(str, (checkout, PROJECT, PROJECT / "src", os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path, "LT_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= dict(variable.split("=") for variable in f"FLOW_FABRIC={kind} {flow.environment}".split())
    for number, command in enumerate(flow.commands):
        placed = command.replace("CHECKPOINT", str(checkpoint)).replace("DATA", str(checkpoint.parent / "data"))
        arguments = [sys.executable, HERE / "with_fabric.py", *placed.replace("RANKS", str(flow.ranks)).split()]
        errors = folder / f"errors-{number}"
        with (folder / f"said-{number}").open("wb") as said, errors.open("wb") as log:
            ended = subprocess.run(
                arguments, cwd=folder, env=environment, input=b"Hello\n\n", stdout=said, stderr=log, timeout=600
            )
        if ended.returncode:
            last = (errors.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
            return f"{command.split()[0]} ended with {ended.returncode}: {last}"
    return ""


def outcome(flow: Flow, folder: Path) -> dict[str, Any]:
    """Return what ``flow`` came to, by name: the losses of each step, all that was saved, and what was generated."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("metrics.csv")):
        with file.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.DictReader(lines)):
                if row.get("loss") or row.get("val_loss"):
                    kept = [row.get(key) for key in ("step", "learning_rate", "loss", "val_loss")]
                    found[f"{file.relative_to(folder)}:{number}"] = kept
    for file in sorted(folder.rglob("lit_model.pth*")):
        for name, value in parts(torch.load(file, map_location="cpu")):
            found[f"{file.relative_to(folder)}: {name}"] = value
    for number, command in enumerate(flow.commands):
        if command.startswith(("generate", "chat")) and (said := folder / f"said-{number}").exists():
            found[command] = said.read_text(encoding="utf-8")
    return found


def parts(saved: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Return the tensors and all else in ``saved``, with their names."""
    if isinstance(saved, (dict, list, tuple)):
        for key, value in saved.items() if isinstance(saved, dict) else enumerate(saved):
            yield from parts(value, f"{name}.{key}")
    else:
        yield name, saved


def same(a: Any, b: Any) -> bool:
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return a.dtype == b.dtype and torch.equal(a, b) if tensors else bool(a == b)


def compare(name: str, flow: Flow, folder: Path, checkpoint: Path, checkout: Path) -> bool:
    """Run one flow both ways, print what came of it, and return whether all is the same."""
    kinds = ("theirs", "ours")
    failed = {kind: run(flow, kind, folder / kind, checkpoint, checkout) for kind in kinds}
    theirs, ours = (outcome(flow, folder / kind) for kind in kinds)
    differing = [key for key in {**theirs, **ours} if not same(theirs.get(key), ours.get(key))]
    good = bool(theirs) and not any(failed.values()) and not differing
    tensors = sum(isinstance(value, torch.Tensor) for value in theirs.values())
    losses = sum("metrics.csv" in key for key in theirs)
    print(f"{'same' if good else 'DIFFERENT'}: {name}, {losses} rows of losses, {tensors} tensors", flush=True)
    for kind in kinds:
        print(f"    {kind}: {failed[kind]}\n" if failed[kind] else "", end="")
    for key in differing[:8]:
        print(f"    {key}: {theirs.get(key)!r:.200}\n        ours: {ours.get(key)!r:.200}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of litgpt")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of flows: " + ", ".join(FLOWS))
    parser.add_argument("--model", choices=("llama", "neox", "experts"), default="llama", help="the kind of model")
    options = parser.parse_intermixed_args()
    folder, checkout = options.folder.resolve(), options.checkout.resolve()
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, HERE / "files.py", folder], env=os.environ | {"PYTHONPATH": checkout}, check=True)
    chosen = [name for name in FLOWS if any(fnmatch(name, pattern) for pattern in options.patterns)]
    sys.exit(not all([compare(name, FLOWS[name], folder / name, folder / options.model, checkout) for name in chosen]))


if __name__ == "__main__":
    main()
