"""One safetensors file from a cold local disk, and from a web server: seconds until every page has been touched.

sudo python benchmarks/reading.py         # some minutes, 2 GB of disk; root, to drop the page cache before each run
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from _environment import environment
from _table import markdown_table, plain_table
from _target import Target, ratio
from safetensors.torch import save_file

HERE = Path(__file__).parent
LABELS = {
    "one_thread": "preadv, 1 thread",
    "four_threads": "preadv, 4 threads",
    "load_file": "safetensors: load_file",
    "ours_mapped": "ours",
    "ours_copied": "ours, mmap=False",
    "connections": "web server: 16 connections",
    "ours_url": "web server: ours",
}
WEB = ("connections", "ours_url")
SHAPES = ((2048, 2048), (2048, 256), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632), (2048,), (2048,))
HEADERS = ("contender", "ready s", "ready + touch s", "min s", "MB/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="of 88 MB each")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes a contender")
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        _write(path, options.layers)
        with _server(path) as port:
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in options.only}
            for _ in range(options.repeats):  # in turns: what else the machine does meets all of them
                for name in options.only:
                    times[name].append(_run(name, path, port))
        size = path.stat().st_size
    both = {name: statistics.median(one[1] for one in its) for name, its in times.items()}
    rows = [
        [
            LABELS[name],
            f"{statistics.median(one[0] for one in its):.2f}",
            f"{both[name]:.2f}",
            f"{min(one[1] for one in its):.2f}",
            f"{size / both[name] / 1e6:,.0f}",
        ]
        for name, its in times.items()
    ]
    print(f"{size / 1e6:,.0f} MB; median of {options.repeats}; {environment()}\n")
    print((markdown_table if options.markdown else plain_table)(HEADERS, rows))
    print()
    for target in _targets(both):
        print(target)
    return 0


def _targets(both: dict[str, float]) -> Iterator[Target]:
    best = min((both[name] for name in ("one_thread", "four_threads", "load_file") if name in both), default=None)
    for name in ("ours_mapped", "ours_copied"):
        if name in both:
            yield Target(f"{LABELS[name]}: over the fastest other", ratio(both[name], best), "at most", 1.05)
    if "ours_url" in both:
        figure = ratio(both.get("connections"), both["ours_url"])
        yield Target("web server: rate over that of 16 connections", figure, "at least", 0.9)


def _write(path: Path, layers: int) -> None:
    state = {}
    for layer in range(layers):
        for number, shape in enumerate(SHAPES):
            bits = torch.randint(-30_000, 30_000, shape, dtype=torch.int16)
            state[f"layers_{layer}_{number}"] = bits.view(torch.bfloat16)
    save_file(state, path)


@contextmanager
def _server(path: Path) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, HERE / "_ranges_server.py", path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def _run(name: str, path: Path, port: str) -> tuple[float, float]:
    """Run a contender in a fresh process: on a cold page cache, or for the web server on a warm one."""
    os.sync()
    if name in WEB:
        path.read_bytes()
    else:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        subprocess.run([sys.executable, "-c", "import fabric_init.api, safetensors.torch, lightning"], check=True)
    command = [sys.executable, HERE / "_reading_contenders.py", name, path, port]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    ready, both = map(float, done.stdout.split())
    return ready, both


if __name__ == "__main__":
    sys.exit(main())
