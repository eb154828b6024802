"""Fold tensors of numbered layers into a single line: ``model.layers.{0..31}.mlp.up_proj.weight``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fabric_init.tools.inspect.contents import TensorRow

Indices = tuple[int, ...]
Template = tuple[str | None, ...]
"""The parts of a name, ``None`` for a number."""


@dataclass(frozen=True, slots=True)
class Folded:
    """``rows`` of equal shape and dtype whose names differ in numbers only; ``name`` stands for exactly these."""

    name: str
    rows: tuple[TensorRow, ...]


def fold(rows: Sequence[TensorRow]) -> list[Folded]:
    """Fold rows, in the order of the first row of each group."""
    groups: dict[tuple[Template, object], dict[Indices, TensorRow]] = {}
    for row in rows:
        template, indices = _split(row.key)
        groups.setdefault((template, (row.shape, row.dtype, row.whole)), {})[indices] = row
    result = []
    for (template, _), members in groups.items():
        for name, which in _folded_names(template, list(members)):
            result.append(Folded(name, tuple(members[each] for each in which)))
    place = {row.key: number for number, row in enumerate(rows)}
    return sorted(result, key=lambda each: place[each.rows[0].key])


def fold_names(keys: Iterable[str]) -> list[str]:
    """Fold names alone."""
    groups: dict[Template, list[Indices]] = {}
    for key in dict.fromkeys(keys):
        template, indices = _split(key)
        groups.setdefault(template, []).append(indices)
    return [name for template, members in groups.items() for name, _ in _folded_names(template, members)]


def _split(key: str) -> tuple[Template, Indices]:
    """Split ``a.3.b`` into ``("a", None, "b")`` and ``(3,)``."""
    template: list[str | None] = []
    indices = []
    for part in key.split("."):
        # A number with leading zeros would not be restored.
        number = int(part) if part.isdecimal() and part.isascii() and len(part) < 19 else -1
        is_number = str(number) == part
        template.append(None if is_number else part)
        indices += [number] * is_number
    return tuple(template), tuple(indices)


def _folded_names(template: Template, members: Sequence[Indices]) -> list[tuple[str, list[Indices]]]:
    """Return the fewest names with braces that stand for exactly these indices, each with its indices."""
    result = []
    for axes in _boxes(sorted(members)):
        texts = iter([_braces(axis) for axis in axes])
        parts = [next(texts) if part is None else part for part in template]
        result.append((".".join(parts), _product(axes)))
    return result


def _boxes(members: Sequence[Indices]) -> list[list[list[int]]]:
    """Return sets of indices whose product is exactly ``members``: those with the same rest are merged."""
    if not members or not members[0]:
        return [[] for _ in members[:1]]
    rests: defaultdict[int, list[Indices]] = defaultdict(list)
    for first, *rest in members:
        rests[first].append(tuple(rest))
    alike: defaultdict[tuple[Indices, ...], list[int]] = defaultdict(list)
    for first, inner in rests.items():
        alike[tuple(inner)].append(first)
    return [[firsts, *box] for inner, firsts in alike.items() for box in _boxes(inner)]


def _product(axes: Sequence[Sequence[int]]) -> list[Indices]:
    result: list[Indices] = [()]
    for axis in axes:
        result = [(*each, number) for each in result for number in axis]
    return result


def _braces(numbers: Sequence[int]) -> str:
    """Return ``7``, ``{0..31}``, ``{0..2,5}``, or with a step ``{0,2..30}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]},{numbers[1]}..{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    if [len(run) for run in runs] == [1, 2]:  # {0,2..9} would be read as a step of 2, so write {0,2,3..9}
        first, last = runs.pop()
        runs += [[first], [last] if last == first + 1 else [first + 1, last]]
    return "{" + ",".join("..".join(map(str, run)) for run in runs) + "}"
