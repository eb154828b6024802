"""The first 4, 16 and 64 layers of a checkpoint of 128: what a partial load reads and holds, beside a plain one.

python benchmarks/partial.py                                 # about three minutes, 1.3 GB of disk
python benchmarks/partial.py --width 64 --repeats 1          # a smoke test; its ratios mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from _environment import environment
from _fresh_process import run_ranks
from _group_result import GroupResult, Run, summarize
from _partial_contenders import LAYERS, OF_TORCH_FILE, WIDTH, write
from _table import markdown_table, megabytes, number, plain_table
from _target import Target, ratio
from _workload import cool

LABELS = {
    "torch_load": "plain: eager + torch.load, picked",
    "load_file": "plain: eager + load_file, picked",
    "hand_written": "hand-written: meta + get_tensor + assign=True",
    "ours": "ours: rename=[Part, Layers]",
    "ours_copied": "ours, mmap=False",
    "ours_torch": "ours, of the torch file",
}
PARTS = [4, 16, 64]
HEADERS = ("contender", "layers", "part MB", "ready s", "touch s", "private MB", "read MB", "x part", "wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS, metavar="LAYERS", help="how many layers to load")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a contender and part")
    parser.add_argument("--only", nargs="+", choices=list(LABELS), help="run these contenders alone")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fabric-init-bench-") as folder:
        root = Path(folder).resolve()
        write(root, LAYERS, options.width)
        size = (root / "model.safetensors").stat().st_size
        results = _run(root, options)

    table = markdown_table if options.markdown else plain_table
    print(f"{LAYERS} layers in bf16, {size / 1e6:,.0f} MB; median of {options.repeats}.", end=" ")
    print(", ".join(f"{key} {value}" for key, value in environment().items()), end="\n\n")
    print(table(HEADERS, [_row(result, layers) for (_, layers), result in results.items()]))
    for result in results.values():
        if result.error:
            print(f"\n{result.label}: {result.error}", end="")
    targets = _targets(results)
    print("\n\nTargets\n", *targets, sep="\n")
    if options.json:
        report = {
            "environment": environment(),
            "bytes": size,
            "results": [{"layers": layers} | asdict(result) for (_, layers), result in results.items()],
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _run(root: Path, options: argparse.Namespace) -> dict[tuple[str, int], GroupResult]:
    cases = [(name, layers) for layers in options.parts for name in LABELS if not options.only or name in options.only]
    runs: dict[tuple[str, int], list[Run]] = {case: [] for case in cases}

    def run(name: str, layers: int, pages: str, count: bool) -> Run:
        arguments = "_partial_contenders", name, str(root), str(layers), str(options.width), pages
        return run_ranks([{}], root if count else None, *arguments)

    for repeat in range(options.repeats):  # interleaved: a slow minute of the machine hits every contender alike
        for name, layers in cases:
            print(f"{repeat + 1}/{options.repeats} {layers} layers, {LABELS[name]}", file=sys.stderr)
            runs[name, layers].append(run(name, layers, "pages as read", count=False))
    results = {}
    for name, layers in cases:
        print(f"bytes read: {layers} layers, {LABELS[name]}", file=sys.stderr)
        counted = run(name, layers, "small pages", count=True)
        cool(root / ("model.pt" if name in OF_TORCH_FILE else "model.safetensors"))
        results[name, layers] = summarize(name, LABELS[name], runs[name, layers], counted)
    return results


def _row(result: GroupResult, layers: int) -> list[str]:
    if result.error:
        return [result.label, str(layers), "error", *["-"] * (len(HEADERS) - 3)]
    return [
        result.label,
        str(layers),
        megabytes(result.shard),
        number(result.seconds, ".3f"),
        number(result.touch_seconds, ".3f"),
        megabytes(result.private),
        megabytes(result.read),
        number(ratio(result.read, result.shard), ".2f"),
        str(result.unfilled),
    ]


def _targets(results: dict[tuple[str, int], GroupResult]) -> list[Target]:
    targets = []
    for (name, layers), result in results.items():
        if name.startswith("ours"):
            what = f"{result.label}, {layers} layers"
            allowed = 1.05 if name == "ours_copied" else 0.05  # of the part, beside what maps share
            read = ratio(result.read, result.shard)
            targets.append(Target(f"{what}, bytes read of the part's", read, "at most", 1.05))
            held = ratio(result.private, result.shard)
            targets.append(Target(f"{what}, private memory of the part's bytes", held, "at most", allowed))
            targets.append(Target(f"{what}, on meta or wrong", result.unfilled, "at most", 0, "tensors"))
    return targets


if __name__ == "__main__":
    sys.exit(main())
