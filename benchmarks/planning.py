"""``fabric-init plan`` for models that no laptop holds: the time and memory of the whole process, imports and all.

python benchmarks/planning.py                                    # less than a minute
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _environment import environment
from _hollow_checkpoint import write_hollow
from _planning_models import LLAMA, llama_shapes, moe_shapes
from _table import markdown_table, plain_table
from _target import Target

HERE = Path(__file__).resolve().parent
OPTIONS = ("--precision", "bf16-true", "--bandwidth", "2GB/s")
HEADERS = ("model", "ranks", "tensors", "GB", "wall s", "CPU s", "peak MB", "GB a rank reads", "GB a rank needs")


@dataclass(frozen=True)
class Planned:
    """What one run of the command took, and what it said."""

    name: str
    ranks: int
    wall_s: float
    cpu_s: float
    peak: int
    status: int
    said: dict[str, Any]


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="fabric-init-plan-") as folder:
        llama, moe = Path(folder, "llama"), Path(folder, "moe")
        write_hollow(llama, llama_shapes(), a_file=40)
        (llama / "config.json").write_text(json.dumps(LLAMA))
        write_hollow(moe, moe_shapes(), a_file=1000)
        disk = sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*"))
        runs = [
            _plan("Llama, 70 B", 8, 1, options.repeats, llama),
            _plan("mixture of experts, 1 T", 8, 32, options.repeats, "_planning_models:MixtureOfExperts", moe),
        ]
    print(f"best of {options.repeats}; files take {disk / 1e6:.0f} MB of disk.", end=" ")
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    table = markdown_table if options.markdown else plain_table
    print(f"\n{table(HEADERS, [_row(run) for run in runs])}\n\nTargets\n")
    targets = [
        Target("Llama, 70 B, on 8 ranks: wall time", runs[0].wall_s, "below", 10, "s"),
        Target("Llama, 70 B, on 8 ranks: peak memory", runs[0].peak / 1e9, "below", 1, "GB"),
        Target("mixture of experts, 1 T: CPU time", runs[1].cpu_s, "below", 30, "s"),
        Target("loads that are complete", sum(run.status == 0 for run in runs), "at least", len(runs), ""),
    ]
    print("\n".join(map(str, targets)))
    if options.json:
        report = {
            "environment": environment(),
            "results": [asdict(run) for run in runs],
            "targets": [asdict(target) | {"met": target.met} for target in targets],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _plan(name: str, devices: int, nodes: int, repeats: int, *arguments: str | Path) -> Planned:
    ranks = ("--strategy", "fsdp2", "--devices", str(devices), "--nodes", str(nodes))
    command = [sys.executable, "-m", "fabric_init", "plan", *map(str, arguments), *ranks, *OPTIONS, "--json"]
    return min((_run(name, devices * nodes, command) for _ in range(repeats)), key=lambda run: run.wall_s)


def _run(name: str, ranks: int, command: Sequence[str]) -> Planned:
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, stdout=output, cwd=HERE, env=os.environ | {"HF_HUB_OFFLINE": "1"}) as child,
    ):
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        said = json.load(output)
    cpu = usage.ru_utime + usage.ru_stime
    return Planned(name, ranks, wall, cpu, usage.ru_maxrss * 1024, child.returncode, said)


def _row(run: Planned) -> list[str]:
    wanted = run.said["coverage"]["wanted"]
    reads, needs = max(run.said["reading"]["by_rank"]), run.said["memory"]["peak"]
    return [
        run.name,
        f"{run.ranks}",
        f"{wanted['tensors']:,}",
        f"{wanted['bytes'] / 1e9:,.1f}",
        f"{run.wall_s:.1f}",
        f"{run.cpu_s:.1f}",
        f"{run.peak / 1e6:,.0f}",
        f"{reads / 1e9:.2f}",
        f"{needs / 1e9:.1f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes for each model")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
