"""The options that the benchmarks of one Llama have in common."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from _workload import Shape, Workload, make_workload


def llama_parser(description: str, contenders: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a contender")
    parser.add_argument("--only", nargs="+", choices=list(contenders), help="run these contenders alone")
    parser.add_argument("--workdir", type=Path, help="make the files here and keep them for the next run")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})


@contextmanager
def workload_of(options: argparse.Namespace) -> Iterator[Workload]:
    """The files; those outside ``--workdir`` are removed again."""
    if options.workdir:
        yield make_workload(options.workdir, shape_of(options))
        return
    with tempfile.TemporaryDirectory(prefix="fabric-init-bench-") as folder:
        yield make_workload(Path(folder), shape_of(options))
