"""Which of the suggested renames are clear, which leave it open what is meant for what, and which go by shape alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fabric_init.planning.hints.name_similarity import Rivals, means_another, related, rivals
from fabric_init.planning.hints.renames import Suggestion

_Shapes = Mapping[str, torch.Size]
_FEW = 2
"""As many tensors may agree with keys in their shapes by chance."""
_MOST_RELATED = 8


class Judged(NamedTuple):
    """Suggestions by what speaks for them."""

    clear: tuple[Suggestion, ...]
    ambiguous: tuple[Rivals, ...]
    by_shape: tuple[Rivals, ...]
    """One or two keys and tensors which have only their shapes in common."""


def judged(suggestions: Sequence[Suggestion], missing: _Shapes, offered: _Shapes) -> Judged:
    """Return which suggestions are clear about which key is meant for which tensor, and what the others are about."""
    stages = [{key: key for key in offered}]
    for suggestion in suggestions:
        pattern = re.compile(suggestion.pattern)
        stages.append({key: pattern.sub(suggestion.replacement, name) for key, name in stages[-1].items()})
    assigned = {name: key for key, name in stages[-1].items() if missing.get(name) == offered[key]}
    clear: list[tuple[Suggestion, set[str]]] = []
    unclear: list[Rivals] = []
    met: set[str] = set()
    for suggestion, names, renamed in zip(suggestions, stages, stages[1:], strict=False):
        new = [key for key, name in renamed.items() if missing.get(name) == offered[key] and name not in met]
        pairs = [(names[key], renamed[key]) for key in new]
        here = {names[key]: shape for key, shape in offered.items() if names[key] not in met}
        wanted = {name: shape for name, shape in missing.items() if name not in met}
        met.update(name for _, name in pairs)
        if not pairs or all(means_another(key, name) for key, name in pairs):
            continue
        found = rivals(pairs, here, wanted, {name: names[key] for name, key in assigned.items()})
        kinds = {re.sub(r"\d+", "{}", name) for _, name in pairs}
        if found is None and (len(kinds) > _FEW or any(related(key, name) for key, name in pairs)):
            clear.append((suggestion, {name for _, name in pairs}))
        else:
            alike = Rivals(tuple(key for key, _ in pairs), tuple(name for _, name in pairs), len(pairs))
            unclear.append(found or alike)
    ambiguous = [found for found in merged(unclear) if not _by_chance(found)]
    by_shape = [found for found in merged(unclear) if _by_chance(found)]
    doubtful = {name for found in unclear for name in found.names}
    return Judged(
        tuple(suggestion for suggestion, its in clear if doubtful.isdisjoint(its)),
        tuple(ambiguous),
        tuple(by_shape),
    )


def merged(unclear: Sequence[Rivals]) -> list[Rivals]:
    """Return rivals that have tensors in common as one."""
    result: list[Rivals] = []
    for found in unclear:
        together = [other for other in result if not set(other.names).isdisjoint(found.names)]
        result = [other for other in result if other not in together]
        keys = dict.fromkeys(key for one in (*together, found) for key in one.keys)
        names = dict.fromkeys(name for one in (*together, found) for name in one.names)
        matches = sum(one.matches for one in (*together, found))
        result.append(Rivals(tuple(keys), tuple(names), matches))
    return result


def _by_chance(found: Rivals) -> bool:
    """Return whether so few tensors and keys of one shape may have nothing to do with one another."""
    if found.matches > _FEW or min(len(found.keys), len(found.names)) > _FEW:
        return False
    return not any(related(key, name) for key in found.keys[:_MOST_RELATED] for name in found.names[:_MOST_RELATED])
