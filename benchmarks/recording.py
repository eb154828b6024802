"""Recording the build of 30,720 parameters: ours beside the meta device, FakeTensorMode and eager, in one run.

python benchmarks/recording.py                                   # about two minutes
python benchmarks/recording.py --layers 2 --experts 8            # a smoke test; its ratios mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from _environment import environment
from _fresh_process import run_contender
from _result import Result, summarize
from _table import markdown_table, plain_table
from _target import Target, ratio

LABELS = {
    "meta": "torch.device('meta')",
    "meta_without_init": "meta, init skipped (lower bound)",
    "fake": "FakeTensorMode",
    "eager": "eager, small tensors",
    "ours": "ours: deferred_init()",
}
HEADERS = ("contender", "median s", "min s", "x meta, median", "x meta, min", "private MB")


def main() -> int:
    options = _options()
    runs: dict[str, list] = {name: [] for name in LABELS}
    sizes = [str(size) for size in (options.layers, options.experts, options.width)]
    for repeat in range(options.repeats):  # interleaved: a slow minute of the machine hits every contender alike
        for name, label in LABELS.items():
            print(f"{repeat + 1}/{options.repeats} {label}", file=sys.stderr)
            runs[name].append(run_contender("_recording_contenders", name, *sizes))
    results = {name: summarize(name, label, runs[name]) for name, label in LABELS.items()}

    meta, ours = results["meta"], results["ours"]
    count = (meta.verified or {}).get("parameters", 0)
    print(f"{count:,} parameters; {options.repeats} runs.", ", ".join(f"{k} {v}" for k, v in environment().items()))
    table = markdown_table if options.markdown else plain_table
    print(f"\n{table(HEADERS, [_row(result, meta) for result in results.values()])}")
    for result in results.values():
        if result.error:
            print(f"\n{result.label}: {result.error}", end="")
    target = Target(f"{ours.label}, time over bare meta's", ratio(ours.seconds, meta.seconds), "at most", 0.8)
    print(f"\n\nTargets\n\n{target}")
    if options.json:
        report = {
            "environment": environment(),
            "parameters": count,
            "results": [asdict(result) for result in results.values()],
            "targets": [asdict(target) | {"met": target.met}],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _row(result: Result, meta: Result) -> list[str]:
    if result.error:
        return [result.label, "error", *["-"] * (len(HEADERS) - 2)]
    ratios = ratio(result.seconds, meta.seconds), ratio(result.least_seconds, meta.least_seconds)
    return [
        result.label,
        f"{result.seconds:.3f}",
        f"{result.least_seconds:.3f}",
        *("-" if figure is None else f"{figure:.2f}" for figure in ratios),
        f"{result.private / 1e6:,.0f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--experts", type=int, default=256, help="experts a layer, of three linears each")
    parser.add_argument("--width", type=int, default=8, help="small: the cost of a parameter is measured, not its size")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes a contender")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
