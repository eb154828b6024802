"""Getting a Llama of 1.1 B parameters ready on one device: ours beside its peers, in one run.

python benchmarks/single_device.py                                  # about ten minutes, 5 GB of disk
python benchmarks/single_device.py --layers 2 --hidden 256          # a smoke test; its ratios mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from _environment import environment
from _fresh_process import run_contender
from _options import llama_parser, shape_of, workload_of
from _result import Result, summarize
from _table import markdown_table, megabytes, number, plain_table
from _target import Target, ratio
from _workload import Workload

LOADED = {
    "plain": "plain: eager + load_state_dict",
    "lightning": "Lightning: empty_init + load_raw",
    "accelerate": "accelerate: init_empty_weights + load",
    "transformers": "transformers: from_pretrained",
    "hand_written": "hand-written: meta + assign=True",
    "hand_written_repaired": "hand-written, buffers repaired",
    "ours_fabric": "ours: init_module(checkpoint=)",
    "ours_core": "ours: deferred_init + materialize",
    "ours_load_state_dict": "ours: empty_init + load_state_dict",
    "ours_load_raw": "ours: empty_init + load_raw",
}
FROM_SCRATCH = {
    "eager": "eager",
    "ours_per_op": "ours: rng='per_op'",
    "ours_init_missing": "ours: empty_init + init_missing",
    "ours_eager_stream": "ours: rng='eager'",
}
COPIED = ("ours_load_state_dict", "ours_load_raw", "ours_per_op", "ours_init_missing")
"""The ways of ours in which the model gets memory of its own."""
GROUPS = {"From a checkpoint": (LOADED, "ours_fabric"), "From scratch": (FROM_SCRATCH, "ours_per_op")}

HEADERS = (
    "contender",
    "ready s",
    "min s",
    "x ours",
    "private MB",
    "RSS MB",
    "first forward s",
    "private MB, forward",
    "RSS MB, forward",
    "on meta",
    "wrong",
)


def main() -> int:
    options = llama_parser(__doc__.splitlines()[0], [*LOADED, *FROM_SCRATCH]).parse_args()
    with workload_of(options) as workload:
        results, manifest = _run(workload, options)

    table = markdown_table if options.markdown else plain_table
    print(f"Llama, {manifest['parameters'] / 1e9:.3g} B parameters, bf16, {manifest['bytes'] / 1e6:,.0f} MB;", end=" ")
    print(f"median of {options.repeats}.", ", ".join(f"{key} {value}" for key, value in environment().items()))
    for title, (labels, ours) in GROUPS.items():
        shown = [results[name] for name in labels if name in results]
        if shown:
            print(f"\n{title}\n")
            print(table(HEADERS, [_row(result, results.get(ours)) for result in shown]))
    for note in _notes(results.values()):
        print(f"\n{note}", end="")
    targets = _targets(results, manifest["bytes"], shape_of(options).largest_bytes)
    print("\n\nTargets\n", *targets, sep="\n")
    if options.json:
        options.json.write_text(json.dumps(_as_json(manifest, results, targets), indent=2) + "\n")
    return 0


def _run(workload: Workload, options: argparse.Namespace) -> tuple[dict[str, Result], dict]:
    labels = LOADED | FROM_SCRATCH
    names = [name for name in labels if not options.only or name in options.only]
    runs: dict[str, list] = {name: [] for name in names}
    for repeat in range(options.repeats):  # interleaved: a slow minute of the machine hits every contender alike
        for name in names:
            print(f"{repeat + 1}/{options.repeats} {labels[name]}", file=sys.stderr)
            runs[name].append(run_contender("_single_device_contenders", name, str(workload.root)))
    results = {name: summarize(name, labels[name], runs[name]) for name in names}
    return results, json.loads(workload.manifest.read_text())


def _row(result: Result, ours: Result | None) -> list[str]:
    if result.error:
        return [result.label, "error", *["-"] * (len(HEADERS) - 2)]
    found = result.verified or {}
    return [
        result.label,
        f"{result.seconds:.3f}",
        f"{result.least_seconds:.3f}",
        number(ratio(result.seconds, ours.seconds if ours else None), ".2f"),
        megabytes(result.private),
        megabytes(result.total),
        "error" if result.forward_error else number(result.forward_seconds, ".3f"),
        megabytes(result.forward_private),
        megabytes(result.forward_total),
        str(found.get("on_meta", "-")),
        str(found.get("wrong", "-")),
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    notes = [f"{result.label}: {result.error}" for result in results if result.error]
    notes += [f"{result.label}: first forward: {result.forward_error}" for result in results if result.forward_error]
    notes += [
        f"{result.label}: on meta or wrong: {result.verified['names']}"
        for result in results
        if result.verified and result.verified["names"]
    ]
    notes += [
        f"{result.label}: of the time, {', '.join(f'{step} {taken:.3f} s' for step, taken in result.steps.items())}"
        for result in results
        if result.steps
    ]
    return notes


def _targets(results: dict[str, Result], model_bytes: int, largest_bytes: int) -> list[Target]:
    """One for each of ours that ran; those against a peer that ``--only`` left out are not judged."""
    targets = []
    for ours in (results[name] for name in ("ours_fabric", "ours_core") if name in results):
        memory = ratio(ours.private, model_bytes / 100)
        if peer := results.get("hand_written"):
            slower = ratio(ours.seconds, peer.seconds)
            targets.append(Target(f"{ours.label}, time over hand-written's", slower, "at most", 1.5))
        if peer := results.get("transformers"):
            slower = ratio(ours.seconds, peer.seconds)
            targets.append(Target(f"{ours.label}, time over from_pretrained's", slower, "below", 1))
        if peer := results.get("lightning"):
            faster = ratio(peer.seconds, ours.seconds)
            targets.append(Target(f"{ours.label}, times faster than Lightning", faster, "at least", 50))
        targets.append(Target(f"{ours.label}, private memory of the model's bytes", memory, "below", 5, "%"))
    if (ours := results.get("ours_per_op")) and (peer := results.get("eager")):
        faster = ratio(peer.seconds, ours.seconds)
        targets.append(Target(f"{ours.label} from scratch, times faster than eager", faster, "at least", 3))
    for ours in (results[name] for name in COPIED if name in results):
        memory = ratio(ours.private, model_bytes + largest_bytes)
        targets.append(Target(f"{ours.label}, private memory over model + largest tensor", memory, "at most", 1.05))
    for ours in (result for name, result in results.items() if name.startswith("ours")):
        targets.append(Target(f"{ours.label}, on meta or wrong", _unfilled(ours), "at most", 0, "tensors"))
    return targets


def _unfilled(result: Result) -> float | None:
    return result.verified["on_meta"] + result.verified["wrong"] if result.verified else None


def _as_json(manifest: dict, results: dict[str, Result], targets: Sequence[Target]) -> dict:
    return {
        "environment": environment(),
        "model": manifest,
        "results": [asdict(result) for result in results.values()],
        "targets": [asdict(target) | {"met": target.met} for target in targets],
    }


if __name__ == "__main__":
    sys.exit(main())
