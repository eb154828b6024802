"""Tensors that the model's own code initialises more than once: alike (wasted), or differently (which one is meant?).

That a model's rule replaces torch's default, or the values that a tensor was made with, is how models are written, and
no finding here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence

from fabric_init.auditing.report import Finding, Level
from fabric_init.auditing.rows import Told, expected_of
from fabric_init.filling.distributions import Moments
from fabric_init.filling.history import Event
from fabric_init.filling.rules import rule_of
from fabric_init.filling.writes import place_of
from fabric_init.recording.tape import Source

_ALIKE = 0.05  # of the larger standard deviation: closer than that, two rules are one


def differ(one: Moments | None, other: Moments | None) -> bool:
    """Whether two rules give different distributions, as far as that can be told."""
    if one is None or other is None:
        return False
    scale = max(one.std, other.std)
    return not (
        math.isclose(one.std, other.std, rel_tol=_ALIKE) and abs(one.mean - other.mean) <= _ALIKE * (scale or 1.0)
    )


def _own_rules(one: Told) -> list[Event]:
    """Full writes by the model's own code, to memory that was there already."""
    return [event for event in one.history.events if event.is_rule and event.whole]


def repeated(told: Sequence[Told]) -> Iterator[Finding]:
    """Tensors that the model's code initialises several times in the same way."""
    groups: dict[tuple[tuple[str, int], ...], list[Told]] = defaultdict(list)
    for one in told:
        rules = _own_rules(one)
        values = [expected_of(one, event) for event in rules]
        if len(rules) > 1 and not any(differ(value, values[-1]) for value in values):
            counts = Counter(f"{rule_of(event.op)} at {place_of(event.source)}" for event in rules)
            groups[tuple(counts.items())].append(one)
    for places, group in groups.items():
        times = sum(count for _, count in places)
        same_line = any(count > 1 for _, count in places)  # several passes over the model; else two rules that agree
        lines = "; ".join(f"{count}× {place}" for place, count in places)
        dead = [event for one in group for event in _own_rules(one) if event.dead]
        yield Finding(
            Level.WARNING if same_line else Level.NOTE,
            "written-more-than-once",
            tuple(one.row.name for one in group),
            f"{len(group)} tensors are initialised {times}× by the model's own code: {lines}. In vain: "
            f"{sum(event.ref.size.numel() for event in dead):,} elements, "
            f"{sum(one.seconds_of(event) for one in group for event in _own_rules(one) if event.dead):.3g} s",
            "initialise once, from the outermost module (after the submodules are built), and mark what is done"
            if same_line
            else "one of the two rules can go",
        )


def two_rules(told: Sequence[Told], own_files: Collection[str | None]) -> Iterator[Finding]:
    """Tensors that two lines of the model's code initialise differently.

    An exception after the rule is how people write init: a note. A line is an exception to another one if it writes
    only a part of what that one writes, or if it is in a file of the model's own and the other in a library's. Where it
    is not, the second may well undo the first by accident: a warning.

    Args:
        told: all rows.
        own_files: the source files of the classes of the model's modules.
    """
    reach: dict[Source, set[str]] = defaultdict(set)
    for one in told:
        for event in _own_rules(one):
            if event.source is not None:
                reach[event.source].add(one.row.name)
    groups: dict[tuple[Source, ...], list[tuple[Told, list[Event]]]] = defaultdict(list)
    for one in told:
        rules = [event for event in _own_rules(one) if event.source is not None]
        if not rules or rules[-1] != one.history.winner:
            continue
        expected = expected_of(one, rules[-1])
        lost = {event.source: event for event in rules if differ(expected_of(one, event), expected)}
        lost.pop(rules[-1].source, None)
        if lost:
            disagreeing = [*lost.values(), rules[-1]]
            groups[tuple(event.source for event in disagreeing if event.source)].append((one, disagreeing))
    for (*losers, won), group in groups.items():
        one, disagreeing = group[0]
        special = all(
            reach[won] < reach[source] or (won.file in own_files and source.file not in own_files) for source in losers
        )
        lines = [f"{_described(one, event)} at {place_of(event.source)}" for event in disagreeing]
        yield Finding(
            Level.NOTE if special else Level.WARNING,
            "two-rules",
            tuple(one.row.name for one, _ in group),
            f"{', then '.join(lines[:-1])}, and last {lines[-1]}, which wins",
            "nothing, if the last rule is meant as an exception to the others"
            if special
            else "decide which rule is meant: the first never takes effect on these tensors. If it is, mark its module "
            "as initialised, or let the last rule pass it by",
        )


def _described(one: Told, event: Event) -> str:
    expected = expected_of(one, event)
    return rule_of(event.op) if expected is None else f"{rule_of(event.op)} (std {expected.std:.3g})"
