"""Print the contents of a checkpoint, on a terminal or into a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fabric_init._text import counted, human_bytes, shape_text
from fabric_init.cli.console import count_text, is_terminal, new_table, printable
from fabric_init.tools.inspect import CheckpointContents, Folded, TensorRow, Values, fold, fold_names

_FEW = 6  # names that a terminal shows of many; a pipe gets all
_NARROW = 100  # columns of a terminal below which dtypes are omitted


def show(out: Console, contents: CheckpointContents, each: bool) -> None:
    """Print everything. ``each``: a line for each tensor and file, else one for all that differ only by a number."""
    for text in _head(contents):
        out.print(text, soft_wrap=True)
    if contents.tensors:
        lines = [Folded(row.key, (row,)) for row in contents.tensors] if each else fold(contents.tensors)
        out.print()
        out.print(_tensors(out, contents, lines, each))
    if each and len(contents.files) > 1:
        out.print()
        out.print(_files(out, contents))
    every = each or not is_terminal(sys.stdout)
    for title, groups in (("tied, the same bytes", contents.ties), ("of equal values", contents.duplicates)):
        if groups:
            out.print()
            out.print(f"{title}:", style="bold")
            shown = [" = ".join(map(printable, group)) for group in groups]
            for line in shown if every else _few(shown):
                out.print(f"  {line}", soft_wrap=True)
    out.print()
    if contents.sound:
        out.print("sound", style="green")
    else:
        out.print(f"not sound: {counted(len(contents.damage), 'fault')}", style="bold red")
        out.print()
        out.print(_damage(out, contents, every))


def _head(contents: CheckpointContents) -> Iterable[Text]:
    files = len(contents.files)
    yield Text(printable(contents.path), style="bold") + Text(
        f": {contents.format}" + (f", {files} files" if files > 1 else ""), style="not bold"
    )
    dtypes = contents.dtypes
    kinds = ", ".join(dtypes if len(dtypes) < 2 else (f"{kind} {human_bytes(size)}" for kind, size in dtypes.items()))
    sizes = f"{count_text(contents.numel)} elements, {human_bytes(contents.nbytes)}"
    yield Text(f"{counted(len(contents.tensors), 'tensor')}, {sizes}" + (f": {kinds}" if kinds else ""))
    if len(contents.entries) > 1:
        shown = (f"{printable(name) or 'the outermost'} ({number})" for name, number in contents.entries.items())
        yield Text(f"state dicts, and their tensors: {', '.join(shown)}")
    if contents.note:
        yield Text(printable(contents.note), style="dim")


def _tensors(out: Console, contents: CheckpointContents, lines: Sequence[Folded], each: bool) -> Table:
    with_values = any(line.rows[0].values for line in lines)
    strange = any(row.values and (row.values.nans or row.values.infs) for row in contents.tensors)
    numbers = ["min", "max", "mean", "std"] * with_values + ["NaN", "Inf"] * strange
    with_file = each and len({row.files for row in contents.tensors}) > 1
    folded = any(len(line.rows) > 1 for line in lines)
    # A single dtype is in the head already; omitting it leaves width for the names.
    with_dtype = out.width > _NARROW or len(contents.dtypes) > 1
    columns = ["tensor", *[""] * folded, "shape", *["dtype"] * with_dtype, "size", *numbers, *["file"] * with_file]
    table = new_table(out, *columns, right=["", "shape", "size", *numbers])
    for line in lines:
        first = line.rows[0]
        cells = [printable(line.name)]
        cells += [f"{len(line.rows):,} ×" if len(line.rows) > 1 else ""] * folded
        cells += [shape_text(first.shape), *[first.dtype] * with_dtype]
        cells.append(human_bytes(sum(row.nbytes for row in line.rows)))
        cells += _numbers(line.rows)[: len(numbers)] if numbers else []
        cells += [", ".join(map(printable, first.files))] * with_file
        table.add_row(*cells, style=None if first.whole else "red")
    return table


def _numbers(rows: Sequence[TensorRow]) -> list[str]:
    """Return the statistics of all elements of the tensors together, which have the same shape."""
    values = [row.values for row in rows if row.values is not None]
    finite = [value for value in values if not math.isnan(value.mean)]
    nans, infs = (f"{sum(value.nans for value in values):,}", f"{sum(value.infs for value in values):,}")
    if not finite:
        return ["-", "-", "-", "-", nans, infs]
    mean, std = _combined(finite)
    statistics = min(value.min for value in finite), max(value.max for value in finite), mean, std
    return [*(f"{number:.4g}" for number in statistics), nans, infs]


def _combined(values: Sequence[Values]) -> tuple[float, float]:
    """Return mean and std of the union of samples of equal size."""
    mean = math.fsum(value.mean for value in values) / len(values)
    variance = math.fsum(value.std**2 + (value.mean - mean) ** 2 for value in values) / len(values)
    return mean, math.sqrt(variance)


def _files(out: Console, contents: CheckpointContents) -> Table:
    table = new_table(out, "file", "size", "tensors", "of size", right=["size", "tensors", "of size"])
    for row in contents.files:
        size = "not there" if row.nbytes is None else human_bytes(row.nbytes)
        style = "red" if row.nbytes is None else None
        table.add_row(printable(row.name), size, f"{row.tensors:,}", human_bytes(row.tensor_nbytes), style=style)
    return table


def _damage(out: Console, contents: CheckpointContents, every: bool) -> Table:
    named = any(damage.tensors for damage in contents.damage)
    table = new_table(out, "damage", "file", "what is wrong", *["tensors"] * named)
    for damage in contents.damage:
        names = [printable(name) for name in fold_names(damage.tensors)]
        shown = [", ".join(names if every else _few(names))] * named
        kind = Text(damage.kind, style="red")
        table.add_row(kind, printable(damage.file or ""), printable(damage.message), *shown)
    return table


def _few(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) <= _FEW else [*names[: _FEW - 1], f"… and {len(names) - _FEW + 1} more"]
