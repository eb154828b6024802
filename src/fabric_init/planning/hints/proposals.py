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
from fabric_init.planning.hints.ambiguous_renames import judged, merged
from fabric_init.planning.hints.conversions import candidates, transposing
from fabric_init.planning.hints.name_similarity import Rivals
from fabric_init.planning.hints.numbering import Numbering
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
    by_shape: tuple[Rivals, ...] = ()
    """A few keys and tensors which have only their shapes in common."""
    gained: frozenset[str] = frozenset()
    """The tensors that all of ``likely`` together would load."""

    def lines(self) -> list[str]:
        """Return the lines of a message."""
        return [f"Likely: {text}" for text in self.likely] + [
            f"Ambiguous, by names and shapes alike: {joined(keys, _MOST_NAMES)} in the checkpoint, "
            f"{joined(names, _MOST_NAMES)} in the model. Say with rename= which is which."
            for keys, names, _ in self.ambiguous
        ]

    def notes(self) -> list[str]:
        """Return lines on what is no mistake, but may be one."""
        return [
            f"Alike in shape alone: {joined(keys, _MOST_NAMES)} in the checkpoint, {joined(names, _MOST_NAMES)} in the "
            "model. If one stands for the other, say so with rename=."
            for keys, names, _ in self.by_shape
        ]


def fitting(matching: Matching) -> frozenset[str]:
    """Return the names of the tensors, and of the extra state, that would be loaded."""
    misfits = {misfit.slot.name for misfit in matching.misfits}
    loads = {entry.slot.name for entry in matching.entries if entry.action is Action.LOAD}
    extra = {name for key in matching.taken if (name := matching.names[key]).endswith(EXTRA_STATE)}
    return frozenset((loads - misfits) | extra)


def tried(matching: Matching, change: Change) -> Matching | None:
    """Return what ``change`` makes of ``matching``; ``None`` if it is refused or loads no more.

    So it is where a tensor that a key already fits would no longer be loaded, or from something else.
    """
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
    if not fitting(found) > fitting(matching):
        return None
    sources = _sources(found)
    kept = all(
        keys <= sources[name][0] and made == sources[name][1] for name, (keys, made) in _sources(matching).items()
    )
    return found if kept else None


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
    before = fitting(matching)
    matched = [matching.names[key] for key in matching.taken if key in matching.names]
    found = judged(likely_renames(missing, offered, matched), missing, offered)
    kept, renames, now, refused = _that_hold(found.clear, matching, missing)
    likely = [_after_own(str(suggestion), "rename", matching) for suggestion in kept]
    fit = fitting(now)
    wanting = {name: shape for name, shape in missing.items() if name not in fit}
    left = {now.names[key]: _shape_of(key, now.names[key], reader) for key in now.unexpected}
    for text in likely_part(kept, wanting, left):
        if matching.options.rename is None and tried(matching, Change((Part(_prefix(kept[0])),))) is not None:
            likely.append(text)
    key_of = {now.names[key]: key for key in now.unexpected}
    conversions: tuple[Conversion, ...] = ()
    for candidate in candidates(wanting, left, key_of):
        better = tried(matching, Change(renames, (*conversions, *candidate.conversions)))
        if better is not None and fitting(better) > fitting(now):
            gain = len(fitting(better)) - len(fitting(now))
            likely.append(candidate.sentence(gain, len(wanting)))
            conversions, now = (*conversions, *candidate.conversions), better
    shifted = numbering_of(now).shifted(wanting, left)
    return Proposals(
        tuple(likely), tuple(merged((*found.ambiguous, *shifted, *refused))), found.by_shape, fitting(now) - before
    )


def numbering_of(matching: Matching) -> Numbering:
    """Return the numbers in the names of a model and in those of a checkpoint, as renamed."""
    return Numbering((name for entry in matching.entries for name in entry.slot.names), matching.names.values())


def _that_hold(
    suggestions: Sequence[Suggestion], matching: Matching, missing: _Shapes
) -> tuple[list[Suggestion], tuple[object, ...], Matching, list[Rivals]]:
    """Return the suggestions that load more, as they are or limited to what needs them, and what they make together.

    Also what those are about that would break another match, or are of a second copy of what is matched.
    """
    kept: list[Suggestion] = []
    refused: list[Rivals] = []
    rules: list[object] = []
    now = matching
    for suggestion in suggestions:
        keys = [now.names[key] for key in now.unexpected]
        pattern = re.compile(suggestion.pattern)
        renamed = {key: pattern.sub(suggestion.replacement, key) for key in keys}
        there = {now.names[key] for key in now.taken if key in now.names}
        second_copy = not there.isdisjoint(renamed.values())
        for rule in () if second_copy else (suggestion, *_narrowed(suggestion, keys, missing)):
            found = tried(matching, Change((*rules, {rule.pattern: rule.replacement})))
            if found is not None and fitting(found) > fitting(now):
                gain = len(fitting(found)) - len(fitting(now))
                kept.append(replace(rule, matches=gain, missing=len(missing)))
                rules.append({rule.pattern: rule.replacement})
                now = found
                break
        else:
            pairs = [(key, name) for key, name in renamed.items() if name in missing and name not in there]
            if pairs:
                refused.append(Rivals(tuple(key for key, _ in pairs), tuple(name for _, name in pairs), len(pairs)))
    return kept, tuple(rules), now, refused


def _sources(matching: Matching) -> dict[str, tuple[frozenset[str], str]]:
    """Return what each tensor that a key fits is loaded from."""
    fit = fitting(matching)
    return {
        entry.slot.name: (frozenset(entry.keys), "" if entry.spec is None else entry.spec.made)
        for entry in matching.entries
        if entry.action is Action.LOAD and entry.slot.name in fit
    }


def likely_fixes(matching: Matching, reader: CheckpointReader) -> list[str]:
    """Return suggestions, each with a rename or conversion under which missing tensors would match."""
    return list(proposals(matching, reader).likely)


class Transposes(NamedTuple):
    """What makes tensors of a wrong shape fit."""

    text: str
    certain: bool
    """Whether no square tensor leaves it open which are transposed."""
    whole: bool
    """Whether all would fit."""

    def line(self) -> str:
        """Return the line of a message."""
        return f"{'Likely' if self.certain else 'Ambiguous'}: {self.text}"


def likely_transpose(matching: Matching, reader: CheckpointReader) -> Transposes | None:
    """Return the conversion under which tensors of a wrong shape would fit; ``None`` if there is none."""
    turned = [m.key for m in matching.misfits if _is_turned(m.slot.shape, m.spec.shape)]
    if not turned:
        return None
    loaded = [(key, entry.slot.shape) for entry in matching.entries for key in entry.keys]
    squares = [key for key, shape in loaded if len(shape) == 2 and shape[0] == shape[1] > 1 and key not in turned]
    conversion = transposing(turned, reader.keys())
    found = tried(matching, Change(convert=(conversion,)))
    if found is None:
        return None
    if not squares:
        return Transposes(f"convert=[{conversion}], in the names of the checkpoint.", True, not found.misfits)
    more = transposing([*turned, *squares], reader.keys())
    return Transposes(
        f"convert=[{conversion}] makes them fit, in the names of the checkpoint. Whether square tensors are transposed "
        f"as well, shapes cannot tell: with all of them it is convert=[{more}].",
        False,
        not found.misfits,
    )


def _is_turned(model: torch.Size, file: torch.Size) -> bool:
    return len(file) == 2 and model != file and tuple(model) == (*file[::-1],)


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
