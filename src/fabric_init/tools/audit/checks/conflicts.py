"""Check for tensors that the code of the model initializes repeatedly: alike (wasted), or differently (a conflict).

A rule of the model that overwrites the default of torch, or the values that a tensor was created with, is usual and not
reported here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from fabric_init.recording.tape.tape import CallSite
from fabric_init.reports.provenance import place_of, rule_of
from fabric_init.reports.statistics import Moments
from fabric_init.reports.write_history import Event
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.rows import AuditedTensor

_ALIKE = 0.05  # of the larger standard deviation: closer rules count as equal


def differ(first: Moments | None, second: Moments | None) -> bool:
    """Return whether two rules are known to have different distributions."""
    if first is None or second is None:
        return False
    scale = max(first.std, second.std)
    return not (
        math.isclose(first.std, second.std, rel_tol=_ALIKE) and abs(first.mean - second.mean) <= _ALIKE * (scale or 1.0)
    )


def _own_rules(tensor: AuditedTensor) -> list[Event]:
    """Return the full writes by the model's own code to existing memory: the one that won, and the dead ones.

    A write that a later rule has read (to scale it, for example) is a step of that rule.
    """
    winner, events = tensor.history.winner, tensor.history.events
    return [event for event in events if event.is_rule and event.whole and (event.dead or event == winner)]


def repeated(tensors: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Report tensors that the code of the model initializes several times in the same way."""
    groups: dict[tuple[tuple[str, int], ...], list[AuditedTensor]] = defaultdict(list)
    for tensor in tensors:
        rules = _own_rules(tensor)
        values = [tensor.expected(event) for event in rules]
        if len(rules) > 1 and not any(differ(value, values[-1]) for value in values):
            counts = Counter(f"{rule_of(event.op)} at {place_of(event.source)}" for event in rules)
            groups[tuple(counts.items())].append(tensor)
    for places, group in groups.items():
        times = sum(count for _, count in places)
        same_line = any(count > 1 for _, count in places)  # several passes over the model; else two rules that agree
        lines = "; ".join(f"{count}× {place}" for place, count in places)
        dead = [event for tensor in group for event in _own_rules(tensor) if event.dead]
        count = "1 tensor is" if len(group) == 1 else f"{len(group)} tensors are"
        elements = sum(event.ref.size.numel() for event in dead)
        seconds = sum(group[0].seconds_of(event) for event in dead)
        yield Finding(
            Level.WARNING if same_line else Level.NOTE,
            "written-more-than-once",
            tuple(tensor.row.name for tensor in group),
            f"{count} initialized {times}× by the model's own code: {lines}. "
            f"Overwritten before being read: {elements:,} elements, {seconds:.3g} s",
            "initialize once, from the outermost module (after the submodules are built), and mark what is done"
            if same_line
            else "remove one of the two rules",
        )


def two_rules(tensors: Sequence[AuditedTensor], own_files: Collection[str | None]) -> Iterator[Finding]:
    """Report tensors that two lines of the model initialize differently.

    An exception after a general rule is usual: a note. If the last line is no exception, it may undo an earlier rule by
    accident: a warning. See :class:`_Reach`.

    Args:
        tensors: all audited tensors.
        own_files: the source files of the classes of the model's modules.
    """
    reach = _Reach(tensors, own_files)
    groups: dict[tuple[CallSite, ...], list[_Conflict]] = defaultdict(list)
    for tensor in tensors:
        rules = [event for event in _own_rules(tensor) if event.source is not None]
        if not rules or rules[-1] != tensor.history.winner:
            continue
        expected = tensor.expected(rules[-1])
        lost = {event.source: event for event in rules if differ(tensor.expected(event), expected)}
        won = rules[-1].source
        lost.pop(won, None)
        losers = tuple(source for source in lost if source is not None)
        if losers and won is not None:
            zeroed = expected == Moments(0.0, 0.0) and len(tensor.row.shape) < 2  # zeroing a bias is always safe
            exception = zeroed or all(reach.is_exception(won, source) for source in losers)
            # the exceptions to one rule are one finding, and so are the tensors of one conflict
            key = losers if exception else (*losers, won)
            groups[key].append(_Conflict(tensor, list(lost.values()), rules[-1], exception))
    for group in groups.values():
        yield _exceptions(group) if group[0].exception else _conflict(group)


class _Conflict(NamedTuple):
    tensor: AuditedTensor
    lost: list[Event]
    won: Event
    exception: bool


class _Reach:
    """The tensors that each line, and each file, initializes."""

    def __init__(self, tensors: Sequence[AuditedTensor], own_files: Collection[str | None]) -> None:
        self._own_files = own_files
        self._lines: dict[CallSite, set[str]] = defaultdict(set)
        self._files: dict[str, set[str]] = defaultdict(set)
        for tensor in tensors:
            for event in _own_rules(tensor):
                if event.source is not None:
                    self._lines[event.source].add(tensor.row.name)
                    self._files[event.source.file].add(tensor.row.name)

    def is_exception(self, later: CallSite, earlier: CallSite) -> bool:
        """Return whether ``later`` is the more special of two lines.

        It is if it writes a subset of the tensors of the other line, if its file initializes fewer tensors of the
        model, or if its file is one of the model's own and the other one belongs to a library.
        """
        if self._lines[later] < self._lines[earlier]:
            return True
        if later.file == earlier.file:
            return False
        smaller = len(self._files[later.file]) < len(self._files[earlier.file])
        return smaller or (later.file in self._own_files and earlier.file not in self._own_files)


def _conflict(group: Sequence[_Conflict]) -> Finding:
    tensor, lost, won, _ = group[0]
    lines = [f"{_rule_and_std(tensor, event)} at {place_of(event.source)}" for event in lost]
    return Finding(
        Level.WARNING,
        "two-rules",
        tuple(conflict.tensor.row.name for conflict in group),
        f"{', then '.join(lines)}, and last {_rule_and_std(tensor, won)} at {place_of(won.source)}, which wins",
        "decide which rule is intended: the first never takes effect on these tensors. If it should, mark its module "
        "as initialized, or let the last rule skip it",
    )


def _exceptions(group: Sequence[_Conflict]) -> Finding:
    tensor, lost, _, _ = group[0]
    rules = [f"{_rule_and_std(tensor, event)} at {place_of(event.source)}" for event in lost]
    exceptions = {place_of(conflict.won.source): _rule_and_std(conflict.tensor, conflict.won) for conflict in group}
    listed = ", ".join(f"{rule} at {place}" for place, rule in exceptions.items())
    return Finding(
        Level.NOTE,
        "two-rules",
        tuple(conflict.tensor.row.name for conflict in group),
        f"{', then '.join(rules)}, and then, as exceptions that win: {listed}",
        "nothing, if the exceptions are intended",
    )


def _rule_and_std(tensor: AuditedTensor, event: Event) -> str:
    expected, rule = tensor.expected(event), rule_of(event.op)
    return rule if expected is None or "std=" in rule else f"{rule} (std {expected.std:.3g})"
