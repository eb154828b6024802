"""Getting a Llama of 1.1 B parameters ready on several ranks: ours beside its peers, in one run.

python benchmarks/distributed.py                                    # about ten minutes, 10 GB of memory, 5 GB of disk
python benchmarks/distributed.py --layers 2 --hidden 256            # a smoke test; its ratios mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict

from _environment import environment
from _fresh_process import run_ranks
from _group_result import GroupResult, Run, summarize
from _options import llama_parser, shape_of, workload_of
from _table import markdown_table, megabytes, number, plain_table
from _target import Target, ratio
from _workload import Workload, cool

GROUPS = {
    "FSDP2": {
        "fsdp2_lightning": "Lightning: empty_init + setup + load_raw",
        "fsdp2_dcp": "DCP: HuggingFaceStorageReader, buffers repaired",
        "fsdp2_broadcast": "plain: to_empty + set_model_state_dict(broadcast_from_rank0), buffers repaired",
        "fsdp2_scratch": "plain, from scratch: to_empty + init_weights, buffers repaired",
        "fsdp2_ours": "ours: init_module(checkpoint=) + setup",
        "fsdp2_ours_plain": "ours: deferred_init + fully_shard + materialize",
        "fsdp2_ours_scratch": "ours, from scratch: deferred_init + fully_shard + materialize",
        "fsdp2_ours_load_state_dict": "ours: empty_init + setup + load_state_dict",
        "fsdp2_ours_load_raw": "ours: empty_init + setup + load_raw",
        "fsdp2_ours_init_missing": "ours: empty_init + setup + init_missing",
    },
    "DDP": {
        "ddp_lightning": "Lightning: empty_init + load_raw + setup",
        "ddp_ours": "ours: init_module(checkpoint=) + setup",
        "ddp_ours_load_state_dict": "ours: empty_init + setup + load_state_dict",
        "ddp_ours_load_raw": "ours: empty_init + setup + load_raw",
        "ddp_ours_init_missing": "ours: empty_init + setup + init_missing",
    },
    "ZeRO-3": {
        "zero3_transformers": "transformers: from_pretrained, zero.Init",
        "zero3_ours": "ours: init_module(checkpoint=) + setup",
        "zero3_ours_load_raw": "ours: empty_init + setup + load_raw",
    },
}
STRATEGY = {name: strategy for strategy, labels in GROUPS.items() for name in labels}
OURS = {strategy: next(name for name in labels if name.endswith("_ours")) for strategy, labels in GROUPS.items()}

HEADERS = (
    "contender",
    "ready s",
    "min s",
    "x ours",
    "first touch s",
    "x ours, both",
    "private MB",
    "RSS MB",
    "read MB",
    "x shard",
    "host MB",
    "on meta",
    "wrong",
)


DEVICE = "device MB"


def main() -> int:
    options = _options()
    headers = HEADERS if options.accelerator == "cpu" else (*HEADERS, DEVICE)
    with workload_of(options) as workload:
        results = _run(workload, options)
        manifest = json.loads(workload.manifest.read_text())

    table = markdown_table if options.markdown else plain_table
    print(f"Llama, {manifest['parameters'] / 1e9:.3g} B parameters, bf16, {manifest['bytes'] / 1e6:,.0f} MB;", end=" ")
    print(f"{options.ranks} ranks on {options.accelerator}; median of {options.repeats}.", end=" ")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    for strategy, labels in GROUPS.items():
        if shown := [results[name] for name in labels if name in results]:
            print(f"\n{strategy}\n")
            print(table(headers, [_row(result, results.get(OURS[strategy]))[: len(headers)] for result in shown]))
    for note in _notes(results.values()):
        print(f"\n{note}", end="")
    targets = _targets(results, manifest["bytes"], shape_of(options).largest_bytes)
    print("\n\nTargets\n", *targets, sep="\n")
    if options.json:
        report = {
            "environment": environment(),
            "ranks": options.ranks,
            "accelerator": options.accelerator,
            "model": manifest,
            "results": [asdict(result) for result in results.values()],
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _run(workload: Workload, options: argparse.Namespace) -> dict[str, GroupResult]:
    names = [name for name in STRATEGY if not options.only or name in options.only]
    labels = {name: GROUPS[STRATEGY[name]][name] for name in names}
    runs: dict[str, list[Run]] = {name: [] for name in names}

    def run(name: str, pages: str, count: bool) -> Run:
        arguments = "_distributed_contenders", name, str(workload.root), options.accelerator, pages
        ranks = _environments(options.ranks, options.accelerator)
        return run_ranks(ranks, workload.root if count else None, *arguments)

    for file in (workload.safetensors, workload.torch_file):
        cool(file)  # what an earlier count may have left
    for repeat in range(options.repeats):  # interleaved: a slow minute of the machine hits every contender alike
        for name in names:
            print(f"{repeat + 1}/{options.repeats} {STRATEGY[name]}, {labels[name]}", file=sys.stderr)
            runs[name].append(run(name, "pages as read", count=False))
    results = {}
    for name in names:
        print(f"bytes read: {STRATEGY[name]}, {labels[name]}", file=sys.stderr)
        results[name] = summarize(name, labels[name], runs[name], run(name, "small pages", count=True))
    return results


def _environments(ranks: int, accelerator: str) -> list[dict[str, str]]:
    """What torchrun would set for each rank, and what keeps gloo and DeepSpeed on this machine and device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "benchmark",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    if accelerator == "cpu":
        common["DS_ACCELERATOR"] = "cpu"
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _row(result: GroupResult, ours: GroupResult | None) -> list[str]:
    if result.error:
        return [result.label, "error", *["-"] * (len(HEADERS) - 1)]
    return [
        result.label,
        number(result.seconds, ".3f"),
        number(result.least_seconds, ".3f"),
        number(ratio(result.seconds, ours.seconds if ours else None), ".2f"),
        number(result.touch_seconds, ".3f"),
        number(ratio(_both(result), _both(ours)), ".2f"),
        megabytes(result.private),
        megabytes(result.total),
        megabytes(result.read),
        number(ratio(result.read, result.shard), ".2f"),
        megabytes(result.host),
        str(len(result.on_meta)),
        str(len(result.wrong)),
        megabytes(result.device),
    ]


def _both(result: GroupResult | None) -> float | None:
    """Ready, and every page of the own part read once."""
    return None if result is None or result.error else result.seconds + result.touch_seconds


def _notes(results: Sequence[GroupResult]) -> list[str]:
    notes = []
    for result in results:
        name = f"{STRATEGY[result.name]}, {result.label}"
        if result.error:
            notes.append(f"{name}: {result.error}")
        if result.unfilled:
            notes.append(f"{name}: on meta or wrong: {', '.join([*result.on_meta, *result.wrong][:4])}")
    return notes


def _targets(results: dict[str, GroupResult], model_bytes: int, largest_bytes: int) -> list[Target]:
    """One for each of ours that ran; those against a peer that ``--only`` left out are not judged."""
    targets = []
    for strategy in ("FSDP2", "ZeRO-3"):
        if ours := results.get(OURS[strategy]):
            room = None if ours.error else ours.shard + largest_bytes
            targets += [
                Target(f"{strategy}, ours, bytes read over the shard's", ratio(ours.read, ours.shard), "at most", 1.05),
                Target(f"{strategy}, ours, private over shard + largest", ratio(ours.private, room), "at most", 1.05),
                Target(f"{strategy}, ours, RSS over shard + largest", ratio(ours.total, room), "at most", 1.05),
            ]
            if ours.device is not None:
                used = ratio(ours.device, room)
                targets.append(Target(f"{strategy}, ours, device memory over the same", used, "at most", 1.05))
    for name, ours in results.items():
        if "_ours_" in name and not ours.error:
            memory = ratio(ours.private, ours.shard + largest_bytes)
            targets.append(
                Target(f"{STRATEGY[name]}, {ours.label}, private over part + largest", memory, "at most", 1.05)
            )
    for peer, bound in {"fsdp2_lightning": 5, "fsdp2_dcp": 3, "fsdp2_broadcast": 3}.items():
        if peer in results and (ours := results.get("fsdp2_ours")):
            name = f"FSDP2, times faster than {results[peer].label.split(':')[0]}"
            faster = ratio(results[peer].seconds, ours.seconds), ratio(_both(results[peer]), _both(ours))
            targets.append(Target(name, faster[0], "at least", bound))
            targets.append(Target(f"{name}, first touch too", faster[1], "at least", bound))
    if (peer := results.get("zero3_transformers")) and (ours := results.get("zero3_ours")):
        faster = ratio(peer.seconds, ours.seconds)
        targets.append(Target("ZeRO-3, times faster than from_pretrained", faster, "at least", 1))
    if ours := results.get("ddp_ours"):
        targets.append(Target("DDP, host memory over one model", ratio(ours.host, model_bytes), "at most", 1.1))
    for ours in (results[name] for name in OURS.values() if name in results):
        targets.append(Target(f"{STRATEGY[ours.name]}, on meta or wrong", ours.unfilled, "at most", 0, "tensors"))
    return targets


def _options() -> argparse.Namespace:
    parser = llama_parser(__doc__.splitlines()[0], STRATEGY)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accelerator", choices=["cpu", "cuda"], default="cpu", help="gloo on the CPU, NCCL on CUDA")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
