"""One rank of 8 with a Llama of 70 B parameters, and of 256 with a trillion: record, shard, plan and fill its part.

python benchmarks/large_world.py                                       # 18 GB of memory, for the part of one of 8 ranks
python benchmarks/large_world.py --llama-ranks 32 --moe-ranks 512      # the same models, 5 GB
python benchmarks/large_world.py --layers 2 --moe-ranks 16             # a smoke test; its ratios mean nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from _environment import environment
from _fresh_process import Phase, run_contender
from _hollow_checkpoint import write_hollow
from _planning_models import LLAMA, MOE, llama_shapes, moe_shapes
from _table import markdown_table, megabytes, number, plain_table
from _target import Target, ratio

MODELS = {
    "llama": "Llama, 70 B",
    "stacked": "mixture of experts, 1 T, stacked",
    "separate": "mixture of experts, 1 T, each a module",
}
CONTENDERS = {
    "ours": "ours: deferred_init + fully_shard + materialize",
    "dcp": "DCP: meta + fully_shard + to_empty + load",
}
FILES = {"llama": 8, "stacked": 1, "separate": 150}
"""How many tensors there are in a file: some 4 GB, unless one tensor has more."""
PHASES = ("build", "shard", "fill", "touch")
HEADERS = (
    "model",
    "contender",
    "ranks",
    "tensors",
    "part GB",
    "build s",
    "shard s",
    "plan s",
    "fill s",
    "touch s",
    "all s",
    "private MB",
    "RSS MB",
    "on meta",
    "wrong",
)


@dataclass(frozen=True)
class Case:
    """One model on one rank of so many, by one contender."""

    model: str
    contender: str
    ranks: int
    rank: int
    runs: tuple[dict[str, Phase], ...]

    @property
    def error(self) -> str | None:
        return next((phase.error for run in self.runs for phase in run.values() if phase.error), None)

    def seconds(self, name: str) -> float:
        return median(run[name].seconds or 0.0 for run in self.runs)

    @property
    def plan_seconds(self) -> float | None:
        """Up to the plan: part of the fill."""
        return median(run["fill"].value["plan"] for run in self.runs) if self.contender == "ours" else None

    @property
    def all_seconds(self) -> float | None:
        return None if self.error else sum(map(self.seconds, PHASES))

    def memory(self, kind: str) -> int:
        return max(getattr(run[name], kind) for run in self.runs for name in PHASES)

    @property
    def found(self) -> dict[str, int]:
        found: dict[str, int] = self.runs[0]["verify"].value
        return found


def main() -> int:
    options = _options()
    cases = list(_cases(options))
    table = markdown_table if options.markdown else plain_table
    print(f"Rank {options.rank}, fake process group, bf16; median of {options.repeats}.", end=" ")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    if options.layers:
        print(f"The first {options.layers} layers of each model.")
    print(f"\n{table(HEADERS, [_row(case) for case in cases])}")
    for case in cases:
        if case.error:
            print(f"\n{MODELS[case.model]}, {CONTENDERS[case.contender]}: {case.error}", end="")
    targets = _targets(cases)
    print("\n\nTargets\n", *targets, sep="\n")
    if options.json:
        report = {
            "environment": environment(),
            "results": [asdict(case) for case in cases],
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="fabric-init-world-") as root:
        for model in options.models:
            layers = options.layers or (LLAMA["num_hidden_layers"] if model == "llama" else MOE["layers"])
            ranks = options.llama_ranks if model == "llama" else options.moe_ranks
            folder = Path(root, model)
            shapes = llama_shapes(layers) if model == "llama" else moe_shapes(layers, stacked=model == "stacked")
            write_hollow(folder, shapes, a_file=FILES[model])
            for name in options.only:
                arguments = name, model, str(layers), str(options.rank % ranks), str(ranks), str(folder)
                runs = []
                for repeat in range(options.repeats):
                    print(f"{repeat + 1}/{options.repeats} {MODELS[model]}, {CONTENDERS[name]}", file=sys.stderr)
                    runs.append(run_contender("_large_world_contenders", *arguments, limit_s=options.limit))
                yield Case(model, name, ranks, options.rank % ranks, tuple(runs))


def _row(case: Case) -> list[str]:
    start = [MODELS[case.model], CONTENDERS[case.contender], str(case.ranks)]
    if case.error:
        return [*start, "error", *["-"] * (len(HEADERS) - 4)]
    found = case.found
    return [
        *start,
        f"{found['tensors']:,}",
        f"{found['part'] / 1e9:.2f}",
        f"{case.seconds('build'):.1f}",
        f"{case.seconds('shard'):.1f}",
        number(case.plan_seconds, ".1f"),
        f"{case.seconds('fill') - (case.plan_seconds or 0):.1f}",
        f"{case.seconds('touch'):.1f}",
        number(case.all_seconds, ".1f"),
        megabytes(case.memory("private")),
        megabytes(case.memory("total")),
        str(found["on_meta"]),
        str(found["wrong"]),
    ]


def _targets(cases: list[Case]) -> list[Target]:
    targets = []
    by_name = {(case.model, case.contender): case for case in cases}
    for model, label in MODELS.items():
        ours, peer = by_name.get((model, "ours")), by_name.get((model, "dcp"))
        if ours is None:
            continue
        left = None if ours.error else ours.found["on_meta"] + ours.found["wrong"]
        targets.append(Target(f"{label}: on meta or wrong", left, "at most", 0, "tensors"))
        held = None if ours.error else ratio(ours.memory("private"), ours.found["part"])
        targets.append(Target(f"{label}: private memory over the part", held, "at most", 0.5))
        if peer is not None:
            targets.append(Target(f"{label}: time over DCP's", ratio(ours.all_seconds, peer.all_seconds), "at most", 1))
    return targets


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--llama-ranks", type=int, default=8)
    parser.add_argument("--moe-ranks", type=int, default=256)
    parser.add_argument("--rank", type=int, default=0, help="the rank to be; beyond the last one, counted round")
    parser.add_argument("--layers", type=int, help="so many of each model's layers alone")
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes a contender")
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for one contender")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
