"""Print a forecast as text and tables, for ``fabric-init plan``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from fabric_init._text import human_bytes, shape_text
from fabric_init.cli.console import is_terminal, new_table, out, printable
from fabric_init.tools.forecast import Coverage, Forecast, Fresh, IoEstimate, Memory

_MOST_ROWS = 20

Row = TypeVar("Row")


def show(forecast: Forecast) -> None:
    """Print ``forecast`` on standard output. Long tables are cut on a terminal; ``--json`` has everything."""
    console = out()
    note = f"; {printable(forecast.note)}" if forecast.note else ""
    console.print(f"{forecast.model} from {printable(str(forecast.checkpoint))} ({forecast.format}{note})")
    _show_coverage(console, forecast.coverage)
    _show_reading(console, forecast)
    _show_memory(console, forecast)
    console.print()
    if forecast.complete:
        console.print("Complete: this load would go through.", style="bold green")
    else:
        console.print("Not complete: this load would be refused, before a weight is read.", style="bold red")
        if _only_strictness_refuses(forecast.coverage):
            console.print("With --no-strict it would go through: the rest gets its own init.")


def _only_strictness_refuses(coverage: Coverage) -> bool:
    against = (coverage.wrong_shapes, coverage.without_values, coverage.problems)
    return not coverage.complete and not any(against) and coverage.loaded.tensors > 0


def _show_coverage(console: Console, coverage: Coverage) -> None:
    wanted, loaded = coverage.wanted, coverage.loaded
    share = f" ({loaded.bytes / wanted.bytes:.1%} of the bytes)" if wanted.bytes else ""
    console.print(
        f"covers {loaded.tensors:,} of {wanted.tensors:,} tensors, "
        f"{human_bytes(loaded.bytes)} of {human_bytes(wanted.bytes)}{share}"
    )
    for cast in coverage.casts:
        console.print(f"casts {cast.tensors:,} tensors, {human_bytes(cast.bytes)}: {cast.saved_as} → {cast.kept_as}")
    _show_fresh(console, "Missing from the checkpoint", coverage.missing)
    _show_fresh(console, "Initialized afresh, as asked", coverage.reinit)
    if coverage.unexpected:
        table = new_table(console, "key", "shape", "dtype", "size", right=["shape", "size"])
        for extra in _shown(console, coverage.unexpected):
            table.add_row(printable(extra.key), shape_text(extra.shape), extra.dtype, human_bytes(extra.bytes))
        _print(console, "Not in the model", table, len(coverage.unexpected))
    if coverage.wrong_shapes:
        table = new_table(console, "tensor")
        for misfit in _shown(console, coverage.wrong_shapes):
            table.add_row(printable(misfit.problem))
        _print(console, "Does not fit the model", table, len(coverage.wrong_shapes))
    if coverage.without_values:
        table = new_table(console, "tensor")
        for name in _shown(console, coverage.without_values):
            table.add_row(name)
        heading = "Gets a value neither from the checkpoint nor from the model's own code"
        _print(console, heading, table, len(coverage.without_values))
    for text in coverage.problems:
        console.print(f"\n{text}")
    if coverage.proposed:
        console.print("\nLikely to help", style="bold")
        for text in coverage.proposed:
            console.print(f"  {printable(text)}")


def _show_fresh(console: Console, heading: str, rows: Sequence[Fresh]) -> None:
    if rows:
        table = new_table(console, "tensor", "shape", "size", "its own init", right=["shape", "size"])
        for row in _shown(console, rows):
            table.add_row(row.name, shape_text(row.shape), human_bytes(row.bytes), row.rule or "none")
        _print(console, heading, table, len(rows))


def _show_reading(console: Console, forecast: Forecast) -> None:
    reading, setting = forecast.reading, forecast.setting
    machines = f" on {setting.nodes} machines" if setting.nodes > 1 else ""
    ranks = f"{setting.ranks:,} ranks{machines}" if setting.ranks > 1 else "one rank"
    sent = ", which rank 0 reads and sends to the others" if reading.way == "broadcast" else ""
    table = new_table(console, "rank", "reads", right=["reads"])
    for name, nbytes in _runs(reading):
        table.add_row(name, human_bytes(nbytes))
    table.add_row("from storage", human_bytes(reading.from_storage))
    _print(console, f"Reading: {setting.strategy}, {ranks}{sent}", table)
    if reading.bandwidth is not None and reading.seconds is not None and reading.seconds_shared is not None:
        speed = f"{human_bytes(int(reading.bandwidth))}/s"
        console.print(
            f"takes {_seconds(reading.seconds)} with {speed} for each rank, "
            f"{_seconds(reading.seconds_shared)} with {speed} for all together"
        )


def _runs(reading: IoEstimate) -> Iterator[tuple[str, int]]:
    """Yield consecutive ranks that read the same number of bytes."""
    first = 0
    for rank in range(1, len(reading.by_rank) + 1):
        if rank == len(reading.by_rank) or reading.by_rank[rank] != reading.by_rank[first]:
            yield (f"{first}" if rank - first == 1 else f"{first} to {rank - 1}, each"), reading.by_rank[first]
            first = rank


def _show_memory(console: Console, forecast: Forecast) -> None:
    memory, setting = forecast.memory, forecast.setting
    table = new_table(console, "for", "bytes", right=["bytes"])
    for name, nbytes in _parts(memory):
        table.add_row(name, human_bytes(nbytes))
    _print(console, f"Memory of each rank, beside activations: {setting.precision}, {setting.optimizer}", table)


def _parts(memory: Memory) -> Iterator[tuple[str, int]]:
    yield "weights", memory.weights
    if memory.masters:
        yield "the optimizer's copy of them", memory.masters
    if memory.gradients:
        yield "gradients", memory.gradients
    if memory.optimizer:
        yield "optimizer states", memory.optimizer
    if memory.passing:
        yield "at most at once in a step", memory.passing
    if memory.filling:
        yield "while it is filled", memory.filling
    yield "peak", memory.peak


def _shown(console: Console, rows: Sequence[Row]) -> Sequence[Row]:
    return rows[:_MOST_ROWS] if is_terminal(sys.stdout) else rows


def _print(console: Console, heading: str, table: Table, rows: int = 0) -> None:
    console.print(f"\n{heading}", style="bold")
    console.print(table)
    if rows > _MOST_ROWS and is_terminal(sys.stdout):
        console.print(f"… and {rows - _MOST_ROWS:,} more (--json has all)")


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
