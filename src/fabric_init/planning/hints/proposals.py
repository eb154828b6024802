"""Propose what would make more of a model and a checkpoint match; each proposal is tried on the headers first."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fabric_init._text import joined
from fabric_init.checkpoints import CheckpointReader, Conversion, Part
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.errors import FabricInitError
from fabric_init.planning.hints.adapters import likely_adapters
from fabric_init.planning.hints.conversions import candidates, likely_transposes
from fabric_init.planning.hints.likeness import Rivals, means_another, rivals
from fabric_init.planning.hints.renames import Suggestion, likely_part, likely_renames
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action

_Shapes = Mapping[str, torch.Size]
_MOST_NUMBERS = 40  # of layers that a rename is limited to
_MOST_NAMES = 20


class Change(NamedTuple):
    """Arguments that an error proposes, in addition to those that the user has given."""

    rename: tuple[object, ...] = ()
    convert: tuple[Conversion, ...] = ()
    reinit: tuple[str, ...] = ()


class Proposals(NamedTuple):
    """What an error proposes, in words."""

    likely: tuple[str, ...] = ()
    ambiguous: tuple[Rivals, ...] = ()
    gained: frozenset[str] = frozenset()
    """The tensors that all of ``likely`` together would load."""

    def lines(self) -> list[str]:
        """Return the lines of a message."""
        return [f"Likely: {text}" for text in self.likely] + [
            f"Ambiguous, by names and shapes alike: {joined(keys, _MOST_NAMES)} in the checkpoint, "
            f"{joined(names, _MOST_NAMES)} in the model. Say with rename= which is which."
            for keys, names in self.ambiguous
        ]


def fitting(matching: Matching) -> frozenset[str]:
    """Return the names of the tensors, and of the extra state, that would be loaded."""
    misfits = {misfit.slot.name for misfit in matching.misfits}
    loads = {entry.slot.name for entry in matching.entries if entry.action is Action.LOAD}
    extra = {name for key in matching.taken if (name := matching.names[key]).endswith(EXTRA_STATE)}
    return frozenset((loads - misfits) | extra)


def tried(matching: Matching, change: Change) -> Matching | None:
    """Return what ``change`` makes of ``matching``; ``None`` if it is refused, loads no more, or breaks a match."""
    rename = matching.options.rename
    own = [] if rename is None else rename if isinstance(rename, Sequence) else [rename]
    options = replace(
        matching.options,
        rename=[*own, *change.rename],  # type: ignore[list-item]
        reinit=[*matching.options.reinit, *change.reinit],
    )
    if matching.again is None:
        return None
    try:
        found = matching.again(change.convert, options)
    except FabricInitError:
        return None
    return found if fitting(found) > fitting(matching) else None


def proposals(matching: Matching, reader: CheckpointReader) -> Proposals:
    """Return renames and conversions under which missing tensors would match."""
    missing = {slot.name: slot.shape for slot in matching.missing} | dict.fromkeys(
        matching.missing_extras, torch.Size()
    )
    if not missing or not matching.unexpected:
        return Proposals()
    offered = {matching.names[key]: _shape_of(key, matching.names[key], reader) for key in matching.unexpected}
    adapters = _adapters(matching, reader, missing, offered)
    if adapters is not None:
        return adapters
    likely: list[str] = []
    rules: list[object] = []
    before = fitting(matching)
    now = matching
    suggestions, ambiguous = _clear(likely_renames(missing, offered), missing, offered)
    kept: list[Suggestion] = []
    for suggestion in suggestions:
        keys = [now.names[key] for key in now.unexpected]
        for rule in (suggestion, *_narrowed(suggestion, keys, missing)):
            found = tried(matching, Change((*rules, {rule.pattern: rule.replacement})))
            if found is not None and fitting(found) > fitting(now):
                gain = len(fitting(found)) - len(fitting(now))
                kept.append(replace(rule, matches=gain, missing=len(missing)))
                likely.append(_after_own(str(kept[-1]), "rename", matching))
                rules.append({rule.pattern: rule.replacement})
                now = found
                break
    renamed = tuple(rules)
    fit = fitting(now)
    wanting = {name: shape for name, shape in missing.items() if name not in fit}
    left = {now.names[key]: _shape_of(key, now.names[key], reader) for key in now.unexpected}
    for text in likely_part(kept, wanting, left):
        if matching.options.rename is None and tried(matching, Change((Part(_prefix(kept[0])),))) is not None:
            likely.append(text)
    key_of = {now.names[key]: key for key in now.unexpected}
    conversions: tuple[Conversion, ...] = ()
    for candidate in candidates(wanting, left, key_of):
        found = tried(matching, Change(renamed, (*conversions, *candidate.conversions)))
        if found is not None and fitting(found) > fitting(now):
            gain = len(fitting(found)) - len(fitting(now))
            likely.append(candidate.sentence(gain, len(wanting)))
            conversions, now = (*conversions, *candidate.conversions), found
    return Proposals(tuple(likely), tuple(ambiguous), fitting(now) - before)


def likely_fixes(matching: Matching, reader: CheckpointReader) -> list[str]:
    """Return suggestions, each with a rename or conversion under which missing tensors would match."""
    return list(proposals(matching, reader).likely)


def likely_transpose(matching: Matching, reader: CheckpointReader) -> tuple[str, bool] | None:
    """Return the conversion under which tensors of a wrong shape would fit, in words, and whether all would.

    ``None`` if there is none.
    """
    turned = {m.key: (m.slot.shape, m.spec.shape) for m in matching.misfits if m.spec.shape != m.slot.shape}
    if likely_transposes(turned) is None:
        return None
    # Square tensors beside them are transposed as well, though their shapes match.
    shapes = {key: (slot.shape, reader.spec(key).shape) for slot, _, keys, *_ in matching.entries for key in keys}
    for conversion in (likely_transposes(shapes), likely_transposes(turned)):
        assert conversion is not None
        found = tried(matching, Change(convert=(conversion,)))
        if found is not None:
            return f"convert=[{conversion}], in the names of the checkpoint.", not found.misfits
    return None


def _shape_of(key: str, name: str, reader: CheckpointReader) -> torch.Size:
    """Return the shape to match by; extra state has none, since modules take it in any shape."""
    extra = key in reader.extra_state or name.endswith(EXTRA_STATE)
    return torch.Size() if extra else reader.spec(key).shape


def _prefix(suggestion: Suggestion) -> str:
    return suggestion.pattern.removeprefix("^").replace("\\.", ".")


def _after_own(text: str, option: str, matching: Matching) -> str:
    return text if matching.options.rename is None else f"{text} (after your own: {option}=[yours, …])"


def _adapters(matching: Matching, reader: CheckpointReader, missing: _Shapes, offered: _Shapes) -> Proposals | None:
    """Return what is proposed where the checkpoint is of the model inside one with adapters."""
    names = [name for entry in matching.entries for name in entry.slot.names]
    found = likely_adapters(missing, offered, names)
    if found is None:
        return None
    result = tried(matching, Change(tuple({old: new} for old, new in found.rules), (), found.reinit))
    if result is None:
        return None
    text = _after_own(str(found), "rename", matching)
    return Proposals((text,), gained=fitting(result) - fitting(matching))


def _clear(
    suggestions: Sequence[Suggestion], missing: _Shapes, offered: _Shapes
) -> tuple[list[Suggestion], list[Rivals]]:
    """Return the suggestions of which it is clear which key is meant for which tensor, and what is not clear."""
    stages = [dict.fromkeys(offered, "")]
    stages[0] = {key: key for key in offered}
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
        if found is None:
            clear.append((suggestion, {name for _, name in pairs}))
        else:
            unclear.append(found)
    doubtful = {name for found in unclear for name in found.names}
    return [suggestion for suggestion, its in clear if doubtful.isdisjoint(its)], _merged(unclear)


def _merged(unclear: Sequence[Rivals]) -> list[Rivals]:
    """Return rivals that have tensors in common as one."""
    merged: list[Rivals] = []
    for found in unclear:
        together = [other for other in merged if not set(other.names).isdisjoint(found.names)]
        merged = [other for other in merged if other not in together]
        keys = dict.fromkeys(key for one in (*together, found) for key in one.keys)
        names = dict.fromkeys(name for one in (*together, found) for name in one.names)
        merged.append(Rivals(tuple(keys), tuple(names)))
    return merged


def _narrowed(suggestion: Suggestion, keys: Collection[str], missing: Collection[str]) -> Iterator[Suggestion]:
    """Yield the suggestion for some layers, or some beginnings of keys: for where others match as they are."""
    pattern = re.compile(suggestion.pattern)
    helped = [key for key in keys if pattern.sub(suggestion.replacement, key) in missing]
    matches = [match for key in helped if (match := pattern.search(key)) is not None]
    if r"(\d+)" in suggestion.pattern:
        text = suggestion.pattern
        for group in range(1, pattern.groups + 1):
            numbers = sorted({match[group] for match in matches}, key=lambda number: (len(number), number))
            if len(numbers) > _MOST_NUMBERS:
                return
            text = text.replace(r"(\d+)", f"({'|'.join(numbers)})", 1)
        yield replace(suggestion, pattern=text)
    if len(helped) == 1:
        name = pattern.sub(suggestion.replacement, helped[0]).replace("\\", "\\\\")
        yield replace(suggestion, pattern=f"^{re.escape(helped[0])}$", replacement=name)
    starts = list(dict.fromkeys(key.partition(".")[0] for key in helped))
    if suggestion.pattern.startswith("^") and 0 < len(starts) <= _MOST_NUMBERS:
        one_of = "|".join(map(re.escape, starts))
        yield replace(suggestion, pattern=rf"^(?=(?:{one_of})(?:\.|$)){suggestion.pattern[1:]}")
