"""Modules of one class: the same weight by different rules, and what was left at torch's own init."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from fabric_init.auditing.conflicts import differ
from fabric_init.auditing.report import Finding, Level
from fabric_init.auditing.rows import Told, expected_of
from fabric_init.filling.distributions import Moments
from fabric_init.filling.writes import place_of

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _role(name: str) -> str:
    """A name without its indices: ``layers.3.fc.weight`` and ``layers.4.fc.weight`` play one role."""
    return _INDEX.sub("*", name)


def _value(one: Told) -> Moments | None:
    winner = one.history.winner
    return None if winner is None else expected_of(one, winner)


def differs_between_twins(told: Sequence[Told]) -> Iterator[Finding]:
    """Weights of one role in modules of one class that different lines initialise, differently.

    One line may give every layer a value of its own (a standard deviation that falls with depth, a fan): that is one
    rule. Shapes may differ for the same reason, so only tensors of one shape are compared.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[Told]] = defaultdict(list)
    for one in told:
        if one.history.winner is not None and _role(one.row.name) != one.row.name and one.row.kind == "parameter":
            groups[_role(one.row.name), one.row.module_class, one.row.shape].append(one)
    for (role, module_class, _), group in groups.items():
        lines: dict[str, list[Told]] = defaultdict(list)
        for one in group:
            assert one.history.winner is not None
            lines[place_of(one.history.winner.source)].append(one)
        usual = max(lines, key=lambda line: len(lines[line]))
        other = lines[usual][0]
        for line, odd in lines.items():
            if line == usual or not differ(_value(odd[0]), _value(other)):
                continue
            forgotten = [one.history.winner.by_default for one in (odd[0], other) if one.history.winner]
            yield Finding(
                Level.WARNING if any(forgotten) and not all(forgotten) else Level.NOTE,
                "differs-between-twins",
                tuple(one.row.name for one in odd),
                f"{role} of {module_class}: {odd[0].row.rule} at {line} here, but {other.row.rule} at {usual} in "
                f"{len(lines[usual])} others ({other.row.name})",
                "nothing, if these layers are meant to start differently; else initialise all by one rule",
            )


def default_init(told: Sequence[Told]) -> Iterator[Finding]:
    """Layers left at torch's own init, in a model that initialises others by rules of its own.

    A class of which *some* layers get the model's rule and others do not looks like an oversight: a warning. A class
    that the model leaves alone altogether: a note.
    """
    own: dict[tuple[str, str], list[Told]] = defaultdict(list)  # by the module's class and its name for the tensor
    left: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for one in told:
        winner = one.history.winner
        if winner is None or one.row.kind != "parameter" or len(one.row.shape) < 2:
            continue
        (left if winner.by_default else own)[one.row.module_class, one.row.name.rpartition(".")[2]].append(one)
    if not own:
        return
    for (module_class, attribute), group in left.items():
        handled = own.get((module_class, attribute))
        first = group[0]
        std = "" if first.row.std is None else f" (std {first.row.std:.3g})"
        compared = f", while {len(handled)} others get {handled[0].row.rule} ({handled[0].row.name})" if handled else ""
        yield Finding(
            Level.WARNING if handled else Level.NOTE,
            "default-init",
            tuple(one.row.name for one in group),
            f"{len(group)} {module_class} weights keep torch's own {first.row.rule}{std}, from when they were made at "
            f"{first.row.place}{compared}",
            "initialise them as the rest of the model, or say in its init that the default is meant",
        )
