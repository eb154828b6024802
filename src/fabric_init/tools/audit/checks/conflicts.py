"""Tensors that the model's own code initializes more than once: alike (wasted), or differently (which one is meant?).

That a model's rule replaces torch's default, or the values that a tensor was made with, is how models are written, and
no finding here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from fabric_init.recording.tape import CallSite
from fabric_init.reports.provenance import place_of, rule_of
from fabric_init.reports.statistics import Moments
from fabric_init.reports.write_history import Event
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.rows import AuditedTensor

_ALIKE = 0.05  # of the larger standard deviation: closer than that, two rules are one


def differ(one: Moments | None, other: Moments | None) -> bool:
    """Whether two rules give different distributions, as far as that can be told."""
    if one is None or other is None:
        return False
    scale = max(one.std, other.std)
    return not (
        math.isclose(one.std, other.std, rel_tol=_ALIKE) and abs(one.mean - other.mean) <= _ALIKE * (scale or 1.0)
    )


def _own_rules(one: AuditedTensor) -> list[Event]:
    """Return the full writes by the model's own code to existing memory: the one that won, and the dead ones.

    A write that a later rule has read (to scale it, for example) is a step of that rule.
    """
    winner = one.history.winner
    return [event for event in one.history.events if event.is_rule and event.whole and (event.dead or event == winner)]


def repeated(told: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Tensors that the model's code initializes several times in the same way."""
    groups: dict[tuple[tuple[str, int], ...], list[AuditedTensor]] = defaultdict(list)
    for one in told:
        rules = _own_rules(one)
        values = [one.expected(event) for event in rules]
        if len(rules) > 1 and not any(differ(value, values[-1]) for value in values):
            counts = Counter(f"{rule_of(event.op)} at {place_of(event.source)}" for event in rules)
            groups[tuple(counts.items())].append(one)
    for places, group in groups.items():
        times = sum(count for _, count in places)
        same_line = any(count > 1 for _, count in places)  # several passes over the model; else two rules that agree
        lines = "; ".join(f"{count}× {place}" for place, count in places)
        dead = [event for one in group for event in _own_rules(one) if event.dead]
        count = "1 tensor is" if len(group) == 1 else f"{len(group)} tensors are"
        elements = sum(event.ref.size.numel() for event in dead)
        seconds = sum(group[0].seconds_of(event) for event in dead)
        yield Finding(
            Level.WARNING if same_line else Level.NOTE,
            "written-more-than-once",
            tuple(one.row.name for one in group),
            f"{count} initialized {times}× by the model's own code: {lines}. "
            f"Overwritten before being read: {elements:,} elements, {seconds:.3g} s",
            "initialize once, from the outermost module (after the submodules are built), and mark what is done"
            if same_line
            else "one of the two rules can go",
        )


def two_rules(told: Sequence[AuditedTensor], own_files: Collection[str | None]) -> Iterator[Finding]:
    """Tensors that two lines of the model's code initialize differently.

    An exception after the rule is how people write init: a note. Where the last line is no exception, it may well undo
    an earlier one by accident: a warning. See :class:`_Reach`.

    Args:
        told: all rows.
        own_files: the source files of the classes of the model's modules.
    """
    reach = _Reach(told, own_files)
    groups: dict[tuple[CallSite, ...], list[_Conflict]] = defaultdict(list)
    for one in told:
        rules = [event for event in _own_rules(one) if event.source is not None]
        if not rules or rules[-1] != one.history.winner:
            continue
        expected = one.expected(rules[-1])
        lost = {event.source: event for event in rules if differ(one.expected(event), expected)}
        won = rules[-1].source
        lost.pop(won, None)
        losers = tuple(source for source in lost if source is not None)
        if losers and won is not None:
            zeroed = expected == Moments(0.0, 0.0) and len(one.row.shape) < 2  # a bias: the safest of rules
            exception = zeroed or all(reach.is_exception(won, source) for source in losers)
            # the exceptions to one rule are one finding, and so are the tensors of one conflict
            key = losers if exception else (*losers, won)
            groups[key].append(_Conflict(one, list(lost.values()), rules[-1], exception))
    for group in groups.values():
        yield _exceptions(group) if group[0].exception else _conflict(group)


class _Conflict(NamedTuple):
    told: AuditedTensor
    lost: list[Event]
    won: Event
    exception: bool


class _Reach:
    """How much of a model each line, and each file, initializes."""

    def __init__(self, told: Sequence[AuditedTensor], own_files: Collection[str | None]) -> None:
        self._own_files = own_files
        self._lines: dict[CallSite, set[str]] = defaultdict(set)
        self._files: dict[str, set[str]] = defaultdict(set)
        for one in told:
            for event in _own_rules(one):
                if event.source is not None:
                    self._lines[event.source].add(one.row.name)
                    self._files[event.source.file].add(one.row.name)

    def is_exception(self, later: CallSite, earlier: CallSite) -> bool:
        """Whether ``later`` is the more special of two lines.

        It is if it writes only a part of what the other one does, or if it is in a file that has less to say of the
        model, or in a file of the model's own while the other is in a library's.
        """
        if self._lines[later] < self._lines[earlier]:
            return True
        if later.file == earlier.file:
            return False
        smaller = len(self._files[later.file]) < len(self._files[earlier.file])
        return smaller or (later.file in self._own_files and earlier.file not in self._own_files)


def _conflict(group: Sequence[_Conflict]) -> Finding:
    one, lost, won, _ = group[0]
    lines = [f"{_described(one, event)} at {place_of(event.source)}" for event in lost]
    return Finding(
        Level.WARNING,
        "two-rules",
        tuple(conflict.told.row.name for conflict in group),
        f"{', then '.join(lines)}, and last {_described(one, won)} at {place_of(won.source)}, which wins",
        "decide which rule is meant: the first never takes effect on these tensors. If it is, mark its module as "
        "initialized, or let the last rule pass it by",
    )


def _exceptions(group: Sequence[_Conflict]) -> Finding:
    one, lost, _, _ = group[0]
    rules = [f"{_described(one, event)} at {place_of(event.source)}" for event in lost]
    exceptions = {place_of(conflict.won.source): _described(conflict.told, conflict.won) for conflict in group}
    listed = ", ".join(f"{rule} at {place}" for place, rule in exceptions.items())
    return Finding(
        Level.NOTE,
        "two-rules",
        tuple(conflict.told.row.name for conflict in group),
        f"{', then '.join(rules)}, and then, as exceptions that win: {listed}",
        "nothing, if the exceptions are meant",
    )


def _described(one: AuditedTensor, event: Event) -> str:
    expected, rule = one.expected(event), rule_of(event.op)
    return rule if expected is None or "std=" in rule else f"{rule} (std {expected.std:.3g})"
