"""Suggest renames for checkpoint keys that do not match the model's tensor names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import islice

import torch

from fabric_init._text import quoted
from fabric_init.planning.hints.numbering import Numbering

_Shapes = dict[str, torch.Size]
_Rule = tuple[str, str]

# Bounds that keep the search for likely renames linear in the number of names.
_SAMPLE = 1000  # names that candidates are looked for in: whole layers of a larger model
_PARTNERS = 4  # names that one key is paired with, for one cut
_CANDIDATES = 40  # rules tried on the sample
_FINALISTS = 3  # rules tried on every key
_ROUNDS = 8  # rules that may be needed together
_WINDOW = 3  # dotted parts that may be replaced at once
_DEPTH = 16  # dotted parts of a name that are looked at


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One entry for ``rename=`` that would likely help."""

    pattern: str
    replacement: str
    matches: int
    """How many missing names it would find a key for, of the same shape, after the suggestions before it."""
    missing: int
    """How many names were missing altogether."""

    def __str__(self) -> str:
        count = f"all {self.missing}" if self.matches == self.missing else f"{self.matches} of {self.missing}"
        plural = "" if self.missing == 1 else "s"
        return f"rename={{{quoted(self.pattern)}: {quoted(self.replacement)}}} would match {count} missing key{plural}"


def likely_renames(
    missing: Mapping[str, torch.Size], unexpected: Mapping[str, torch.Size], both: Collection[str] = ()
) -> list[Suggestion]:
    """Return renames that make unexpected checkpoint keys match missing tensor names of the same shape; best first.

    It finds prefixes and dotted parts that were added, removed or replaced (with numbers carried over), such as
    ``^model\\.`` -> nothing or ``\\.gamma$`` -> ``.weight``. Several suggestions are meant together, in their order.
    Only these names are looked at: whether a rename breaks a key that already matches is for the caller to try. Time is
    linear in the number of names.

    Args:
        missing: tensors of the model that no key is for.
        unexpected: checkpoint keys, renamed as the user asked, that no tensor is for.
        both: the names that model and checkpoint have.
    """
    suggestions: list[Suggestion] = []
    wanted, offered = dict(missing), dict(unexpected)
    met: set[str] = set()
    for _ in range(_ROUNDS):
        numbering = Numbering((*wanted, *both), (*offered, *both))
        best = _best_rule(wanted, offered, met, {suggestion.pattern for suggestion in suggestions}, numbering)
        if best is None:
            break
        rule, matched = best
        suggestions.append(Suggestion(*rule, len(matched) - len(met), len(missing)))
        pattern = re.compile(rule[0])
        offered = {pattern.sub(rule[1], key): shape for key, shape in offered.items()}
        met = matched
    return suggestions


def likely_part(
    suggestions: Sequence[Suggestion], missing: Mapping[str, torch.Size], unexpected: Mapping[str, torch.Size]
) -> list[str]:
    """Return a sentence if removing one prefix leaves nothing ``missing``, and no key with it unexpected."""
    if len(suggestions) != 1 or missing or not unexpected or suggestions[0].replacement:
        return []
    prefix = suggestions[0].pattern.removeprefix("^").replace("\\.", ".")
    if "^" + re.escape(prefix) != suggestions[0].pattern:
        return []
    return [
        f"rename=fabric_init.checkpoints.Part({prefix!r}) takes that part alone, without the rest ({len(unexpected)})"
    ]


def _best_rule(
    wanted: _Shapes, offered: _Shapes, met: set[str], used: set[str], numbering: Numbering
) -> tuple[_Rule, set[str]] | None:
    """Return the rule that matches most of ``wanted``, and the names; ``None`` if none matches more."""
    rest = {name: shape for name, shape in wanted.items() if name not in met}
    some_wanted, some_offered = _sampled(rest, {key: shape for key, shape in offered.items() if key not in met})
    # A dict can have a pattern only once.
    unused = (rule for rule in _candidates(some_wanted, some_offered, numbering) if rule[0] not in used)
    votes = Counter(unused).most_common(_CANDIDATES)
    hopeful = sorted(
        (rule for rule, _ in votes), key=lambda rule: _merit(rule, some_wanted, some_offered, numbering), reverse=True
    )
    best: tuple[_Rule, set[str]] | None = None
    for rule in hopeful[:_FINALISTS]:
        matched = _matched(rule, wanted, offered, numbering)
        gain = len(matched) - len(met)
        if gain > 0 and (best is None or len(matched) > len(best[1])):
            best = rule, matched
    return best


def _merit(rule: _Rule, wanted: _Shapes, offered: _Shapes, numbering: Numbering) -> tuple[int, float, int]:
    """Rank a rule by its matches; then by how alike old and new are (q to q, not to k); then the shorter pattern."""
    return len(_matched(rule, wanted, offered, numbering)), SequenceMatcher(None, *rule).ratio(), -len(rule[0])


def _matched(rule: _Rule, wanted: _Shapes, offered: _Shapes, numbering: Numbering) -> set[str]:
    """Return the wanted names that the rule finds a key for.

    None if two keys would get the same name, or one a name whose numbers tell that it is not meant.
    """
    pattern = re.compile(rule[0])
    renamed = {pattern.sub(rule[1], key): key for key in offered}
    if len(renamed) < len(offered):
        return set()
    matched = {name: key for name, key in renamed.items() if wanted.get(name) == offered[key]}
    return set() if any(numbering.apart(key, name) for name, key in matched.items() if key != name) else set(matched)


def _candidates(wanted: _Shapes, offered: _Shapes, numbering: Numbering) -> Iterator[_Rule]:
    """Yield a rule for each pair of names of one shape that differ in one run of dotted parts; often the same rule.

    Names are filed under what is left when a run is cut out, so that nothing is compared pair by pair.
    """
    filed: defaultdict[tuple[object, ...], list[tuple[str, ...]]] = defaultdict(list)
    for name, shape in wanted.items():
        for head, run, tail in _cuts(name):
            filed[head, tail, shape].append(run)
    for key, shape in offered.items():
        for head, run, tail in _cuts(key):
            for other in filed.get((head, tail, shape), ())[:_PARTNERS]:
                # Runs with a part in common at an end belong to a shorter cut.
                if run[:1] == other[:1] or run[-1:] == other[-1:]:
                    continue
                if numbering.apart(key, ".".join((*head, *other, *tail))):
                    continue
                if run or not head:
                    yield _rule(head, run, other, tail)
                    continue
                # Parts are added inside the name: one of the neighbors says where.
                yield _rule(head[:-1], head[-1:], (head[-1], *other), tail)
                if tail:
                    yield _rule(head, tail[:1], (*other, tail[0]), tail[1:])


def _cuts(name: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]:
    parts = tuple(name.split("."))[:_DEPTH]
    for start in range(len(parts) + 1):
        for stop in range(start, min(start + _WINDOW, len(parts)) + 1):
            yield parts[:start], parts[start:stop], parts[stop:]


def _rule(head: tuple[str, ...], old: tuple[str, ...], new: tuple[str, ...], tail: tuple[str, ...]) -> _Rule:
    """Return regex and replacement that put ``new`` for ``old`` between ``head`` and ``tail``."""
    pattern = ("\\." if head else "^") + re.escape(".".join(old))
    if not tail:
        pattern += "$"
    elif old:
        pattern += "\\."
    middle = ".".join(new).replace("\\", "\\\\")
    replacement = ("." if head and (new or tail) else "") + middle + ("." if new and tail else "")
    numbers = re.findall(r"\d+", ".".join(old))
    if numbers and numbers == re.findall(r"\d+", middle):
        # The same numbers on both sides are layer indices: one rule for all layers.
        pattern = re.sub(r"\d+", lambda _: r"(\d+)", pattern)
        groups = iter(range(1, len(numbers) + 1))
        replacement = re.sub(r"\d+", lambda _: f"\\{next(groups)}", replacement)
    return pattern, replacement


def _sampled(wanted: _Shapes, offered: _Shapes) -> tuple[_Shapes, _Shapes]:
    """Return some names of both sides that belong together: those with the same last layer (or expert) numbers."""
    groups: defaultdict[str | None, _Shapes] = defaultdict(dict)
    for name, shape in wanted.items():
        groups[_last_number(name)][name] = shape
    chosen: _Shapes = {}
    numbers = set()
    for number, group in groups.items():
        if len(chosen) < _SAMPLE:
            chosen.update(islice(group.items(), _SAMPLE))
            numbers.add(number)
    if len(numbers) == len(groups):
        partners = iter(offered.items())
    else:
        partners = ((key, shape) for key, shape in offered.items() if _last_number(key) in numbers)
    return chosen, dict(islice(partners, 4 * _SAMPLE))


def _last_number(name: str) -> str | None:
    for part in reversed(name.split(".")):
        if part.isdigit():
            return part
    return None
