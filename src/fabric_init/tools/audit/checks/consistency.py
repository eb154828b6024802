"""Check modules of the same class: weights by different rules, and weights left at the default init of torch."""

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


_FIX = "initialize them like the rest of the model, or comment in its init that the default is intended"


def _role(name: str) -> str:
    """Return a name without its indices: ``layers.3.fc.weight`` and ``layers.4.fc.weight`` play the same role."""
    return _INDEX.sub("*", name)


def _value(tensor: AuditedTensor) -> Moments | None:
    winner = tensor.history.winner
    return None if winner is None else tensor.expected(winner)


def differs_between_twins(tensors: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Report weights of the same role and module class that different lines initialize differently.

    A line may initialize every layer differently (a standard deviation that falls with depth, a fan): that is a single
    rule. Shapes may differ for the same reason, so only tensors of the same shape are compared.
    """
    groups: dict[tuple[str, str, tuple[int, ...]], list[AuditedTensor]] = defaultdict(list)
    for tensor in tensors:
        row, role = tensor.row, _role(tensor.row.name)
        if tensor.history.winner is not None and role != row.name and row.kind == "parameter":
            groups[role, row.module_class, row.shape].append(tensor)
    for (role, module_class, _), group in groups.items():
        lines: dict[str, list[AuditedTensor]] = defaultdict(list)
        for tensor in group:
            assert tensor.history.winner is not None
            lines[place_of(tensor.history.winner.source)].append(tensor)
        usual = max(lines, key=lambda line: len(lines[line]))
        other = lines[usual][0]
        for line, odd in lines.items():
            if line == usual or not differ(_value(odd[0]), _value(other)):
                continue
            yield Finding(
                Level.WARNING if _by_default(odd[0]) and not _by_default(other) else Level.NOTE,
                "differs-between-twins",
                tuple(tensor.row.name for tensor in odd),
                f"{role} of {module_class}: {odd[0].row.rule} at {line} here, but {other.row.rule} at {usual} in "
                f"{_others(lines[usual])}",
                "nothing, if these layers are meant to start differently; else initialize all by one rule",
            )


def default_init(tensors: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Report weights left at the default init of torch in a model that initializes most weights by its own rules.

    If most tensors of a class get the rule of the model and a few do not, that looks like an oversight: a warning.
    Classes that the model leaves alone are reported in a single note. (A zeroed output layer is no rule of its own.)
    """
    own: dict[tuple[str, str], list[AuditedTensor]] = defaultdict(
        list
    )  # by the module's class and its name for the tensor
    left: dict[tuple[str, str], list[AuditedTensor]] = defaultdict(list)
    for tensor in tensors:
        row = tensor.row
        if tensor.history.winner is not None and row.kind == "parameter" and len(row.shape) > 1:
            (left if _by_default(tensor) else own)[row.module_class, row.name.rpartition(".")[2]].append(tensor)

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
            tuple(tensor.row.name for tensor in group),
            f"torch's own {first.rule}, from when {first.module_class} was made at {first.place}, while "
            f"{handled[0].row.rule} is what {_others(handled)} get",
            _FIX,
        )
    if untouched:
        classes = Counter(tensor.row.module_class for tensor in untouched)
        counts = ", ".join(f"{count} in {name}" for name, count in classes.items())
        yield Finding(
            Level.NOTE,
            "default-init",
            tuple(tensor.row.name for tensor in untouched),
            f"{counts}: weights with torch's own init ({untouched[0].row.rule}, say), from when they were made",
            _FIX,
        )


def _by_default(tensor: AuditedTensor) -> bool:
    return tensor.history.winner is not None and tensor.history.winner.by_default


def _others(group: Sequence[AuditedTensor]) -> str:
    return group[0].row.name if len(group) == 1 else f"{len(group)} others ({group[0].row.name})"
