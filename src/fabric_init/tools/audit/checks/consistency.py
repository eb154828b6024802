"""Modules of one class: the same weight by different rules, and what was left at torch's own init."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from fabric_init.reports.provenance import place_of
from fabric_init.reports.statistics import Moments
from fabric_init.tools.audit.checks.conflicts import differ
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.rows import AuditedTensor

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


_FIX = "initialize them as the rest of the model, or leave a word in its init that the default is meant"


def _role(name: str) -> str:
    """A name without its indices: ``layers.3.fc.weight`` and ``layers.4.fc.weight`` play one role."""
    return _INDEX.sub("*", name)


def _value(one: AuditedTensor) -> Moments | None:
    winner = one.history.winner
    return None if winner is None else one.expected(winner)


def differs_between_twins(told: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Weights of one role in modules of one class that different lines initialize, differently.

    One line may give every layer a value of its own (a standard deviation that falls with depth, a fan): that is one
    rule. Shapes may differ for the same reason, so only tensors of one shape are compared.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[AuditedTensor]] = defaultdict(list)
    for one in told:
        if one.history.winner is not None and _role(one.row.name) != one.row.name and one.row.kind == "parameter":
            groups[_role(one.row.name), one.row.module_class, one.row.shape].append(one)
    for (role, module_class, _), group in groups.items():
        lines: dict[str, list[AuditedTensor]] = defaultdict(list)
        for one in group:
            assert one.history.winner is not None
            lines[place_of(one.history.winner.source)].append(one)
        usual = max(lines, key=lambda line: len(lines[line]))
        other = lines[usual][0]
        for line, odd in lines.items():
            if line == usual or not differ(_value(odd[0]), _value(other)):
                continue
            yield Finding(
                Level.WARNING if _by_default(odd[0]) and not _by_default(other) else Level.NOTE,
                "differs-between-twins",
                tuple(one.row.name for one in odd),
                f"{role} of {module_class}: {odd[0].row.rule} at {line} here, but {other.row.rule} at {usual} in "
                f"{_others(lines[usual])}",
                "nothing, if these layers are meant to start differently; else initialize all by one rule",
            )


def default_init(told: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Weights left at torch's own init, in a model that initializes most of its weights by rules of its own.

    Where most of one class get the model's rule and a few do not, that looks like an oversight: a warning. What the
    model leaves alone altogether is one note. (A zeroed output layer does not make a model one that sets its own.)
    """
    own: dict[tuple[str, str], list[AuditedTensor]] = defaultdict(
        list
    )  # by the module's class and its name for the tensor
    left: dict[tuple[str, str], list[AuditedTensor]] = defaultdict(list)
    for one in told:
        if one.history.winner is not None and one.row.kind == "parameter" and len(one.row.shape) > 1:
            (left if _by_default(one) else own)[one.row.module_class, one.row.name.rpartition(".")[2]].append(one)
    if sum(map(len, own.values())) <= sum(map(len, left.values())):
        return
    untouched: list[AuditedTensor] = []
    for key, group in left.items():
        handled, first = own.get(key, []), group[0].row
        if len(handled) <= len(group):
            untouched += group
            continue
        yield Finding(
            Level.WARNING,
            "default-init",
            tuple(one.row.name for one in group),
            f"torch's own {first.rule}, from when {first.module_class} was made at {first.place}, while "
            f"{handled[0].row.rule} is what {_others(handled)} get",
            _FIX,
        )
    if untouched:
        classes = Counter(one.row.module_class for one in untouched)
        counts = ", ".join(f"{count} in {name}" for name, count in classes.items())
        yield Finding(
            Level.NOTE,
            "default-init",
            tuple(one.row.name for one in untouched),
            f"{counts}: weights with torch's own init ({untouched[0].row.rule}, say), from when they were made",
            _FIX,
        )


def _by_default(one: AuditedTensor) -> bool:
    return one.history.winner is not None and one.history.winner.by_default


def _others(group: Sequence[AuditedTensor]) -> str:
    return group[0].row.name if len(group) == 1 else f"{len(group)} others ({group[0].row.name})"
