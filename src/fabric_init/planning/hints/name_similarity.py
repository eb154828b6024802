"""How alike two names are, by their words: what tells apart tensors of one shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

_Shapes = Mapping[str, torch.Size]
_Run = tuple[str, ...]

_SYNONYMS = {
    word: meaning
    for meaning, words in {
        "q": "query queries wq",
        "k": "key keys wk",
        "v": "value values wv",
        "o": "out output wo",
        "gate": "w1",
        "down": "w2",
        "up": "w3",
        "weight": "gamma kernel",
        "bias": "beta",
        "norm": "ln layernorm layer_norm rmsnorm rms_norm",
        "embed": "embedding embeddings emb",
        "position": "pos positions wpe",
        "token": "tok tokens word words wte",
        "linear": "fc dense lin",
        "attention": "attn",
        "mlp": "ff ffn feedforward feed_forward",
        "layers": "layer block blocks h",
    }.items()
    for word in words.split()
}
_FIXED = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_extra_state"))
"""Last parts of names that always mean the same, so that one never stands for another."""
_LM_HEADS = frozenset(
    (
        "lm_head",
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        "predictions",
        "mlm_head",
        "generator_predictions",
    )
)
_OTHER_HEADS = frozenset(
    (
        "classifier",
        "pre_classifier",
        "score",
        "classification_head",
        "qa_outputs",
        "summary",
        "sequence_summary",
        "pooler",
    )
)
_KINDS = frozenset(
    (
        "norm",
        "linear",
        "conv",
        "embed",
        "layers",
        "mlp",
        "head",
        "classifier",
        "score",
        "lm",
        "cls",
        "o",
        "weight",
        "bias",
    )
)
"""Words for kinds of modules, which unrelated ones have in common."""
_FILLERS = frozenset(("proj", "projection", "to", "module", "model", "net"))
_PAIRS = 8  # of one rename that are looked at: its other pairs are of other layers


def words_of(run: Iterable[str]) -> list[str]:
    """Return the words of dotted parts, each in its usual form: ``q`` for ``query`` and for ``wq``."""
    words = []
    for part in run:
        whole = _SYNONYMS.get(part.lower())
        if whole is not None:
            words.append(whole)
            continue
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", part):
            words.append(_SYNONYMS.get(word.lower(), word.lower()))
    return words


def likeness(old: Iterable[str], new: Iterable[str]) -> float:
    """Return how many words two runs of dotted parts have in common; the same numbers count most."""
    ours, theirs = words_of(old), words_of(new)
    numbers = [word for word in ours if word.isdigit()]
    same_numbers = bool(numbers) and numbers == [word for word in theirs if word.isdigit()]
    common = Counter(ours) & Counter(theirs)
    rest, others = list((Counter(ours) - common).elements()), list((Counter(theirs) - common).elements())
    related = sum(
        any(min(len(a), len(b)) > 2 and (a.startswith(b) or b.startswith(a)) for b in others)
        for a in rest
        if not a.isdigit()
    )
    return 10 * same_numbers + common.total() + related / 2


def means_another(key: str, name: str) -> bool:
    """Return whether a key cannot stand for a tensor although their shapes agree: bias for weight, another head."""
    (*of_key, leaf), (*of_name, other) = key.split("."), name.split(".")
    if leaf != other and ({leaf, other} <= _FIXED or "_extra_state" in (leaf, other)):
        return True
    return not _LM_HEADS.isdisjoint(of_key) and not _OTHER_HEADS.isdisjoint(of_name)


def related(key: str, name: str) -> bool:
    """Return whether the words of a key and a tensor's name say that one stands for the other.

    That is so where they differ by parts that were added, by numbers, by synonyms, or share a word for more than a kind
    of module.
    """
    ours, theirs = key.split("."), name.split(".")
    head, tail = _common(ours, theirs)
    old, new = ours[len(head) : len(ours) - len(tail)], theirs[len(head) : len(theirs) - len(tail)]
    if not old or not new:
        return not any(part.isdecimal() for part in (*old, *new))
    words, others = _without_numbers(old), _without_numbers(new)
    if words == others or (words - _FILLERS and words - _FILLERS == others - _FILLERS):
        return True
    if 1 in (len(old), len(new)) and _without_numbers(old[-1:]) == _without_numbers(new[-1:]):
        return not any(part.isdecimal() for part in (*old, *new))
    common = (words & others) | set(words_of(tail[:-1]))
    return not common - {word for word in common if word.isdigit()} <= _KINDS | _FILLERS


def _without_numbers(run: Iterable[str]) -> set[str]:
    return {word for word in words_of(run) if not word.isdigit()}


class Rivals(NamedTuple):
    """Keys and tensors of which it cannot be said which belong together."""

    keys: tuple[str, ...]
    names: tuple[str, ...]
    matches: int = 1
    """How many tensors are in doubt, those of other layers included."""


def rivals(
    pairs: Sequence[tuple[str, str]], keys: _Shapes, names: _Shapes, assigned: Mapping[str, str]
) -> Rivals | None:
    """Return what else would fit as well as some of ``pairs``; ``None`` if nothing would.

    Args:
        pairs: of key and name that a rename brings together.
        keys: those that no tensor has matched so far, by the names that they have before that rename.
        names: tensors that no key has matched so far.
        assigned: name -> key, for all the renames that are suggested together.
    """
    step = max(1, len(pairs) // _PAIRS)
    for key, name in pairs[::step][:_PAIRS]:
        found = _rivals_of(key, name, keys, names, assigned)
        if found is not None:
            return found._replace(matches=len(pairs))
    return None


def _rivals_of(key: str, name: str, keys: _Shapes, names: _Shapes, assigned: Mapping[str, str]) -> Rivals | None:
    head, tail = _common(key.split("."), name.split("."))
    old, new = _middle(key, head, tail), _middle(name, head, tail)
    assert old is not None
    assert new is not None
    ours = likeness(old, new)
    other_keys, other_names = [], []
    for other, shape in names.items():
        middle = _middle(other, head, tail) if shape == names[name] and other != name else None
        if middle is None:
            continue
        its_key = assigned.get(other)
        its_old = None if its_key is None else _middle(its_key, head, tail)
        if its_key is None or its_old is None:
            if its_key is None and likeness(old, middle) >= ours:
                other_names.append(other)
        elif likeness(old, middle) + likeness(its_old, new) >= ours + likeness(its_old, middle):
            other_names.append(other)
            other_keys.append(its_key)
    taken = set(assigned.values())
    for other, shape in keys.items():
        if shape == names[name] and other != key and other not in taken:
            middle = _middle(other, head, tail)
            if middle is not None and likeness(middle, new) >= ours:
                other_keys.append(other)
    other_keys += [
        other for other in keys if other not in taken and keys[other] == names[name] and _as_near(other, key, name)
    ]
    other_names += [
        other for other in names if other not in assigned and names[other] == names[name] and _as_near(other, name, key)
    ]
    if not other_keys and not other_names:
        return None
    return Rivals((key, *dict.fromkeys(other_keys)), (name, *other_names))


def _as_near(other: str, one: str, wanted: str) -> bool:
    """Return whether ``other`` is a second copy of ``one``: it has as much in common with what it is wanted for."""
    if other == one or re.findall(r"\d+", other) != re.findall(r"\d+", wanted):
        return False
    parts, aim = other.split("."), wanted.split(".")
    head, tail = _common(parts, aim)
    pair_head, pair_tail = _common(one.split("."), aim)
    if (head, tail) == (pair_head, pair_tail):
        return False  # what is between them tells
    return len(tail) == len(parts) > 1 or len(head) + len(tail) >= len(pair_head) + len(pair_tail)


def _common(ours: list[str], theirs: list[str]) -> tuple[list[str], list[str]]:
    """Return the dotted parts that two names have in common at their beginnings, and at their ends."""
    most = min(len(ours), len(theirs))
    head = next((at for at in range(most) if ours[at] != theirs[at]), most)
    tail = next((at for at in range(most - head) if ours[-1 - at] != theirs[-1 - at]), most - head)
    return ours[:head], ours[len(ours) - tail :]


def _middle(name: str, head: list[str], tail: list[str]) -> _Run | None:
    """Return what is between two ends of a name; ``None`` for one with other ends."""
    if (head and not name.startswith(head[0])) or (tail and not name.endswith(tail[-1])):
        return None
    parts = name.split(".")
    stop = len(parts) - len(tail)
    if stop < len(head) or parts[: len(head)] != head or parts[stop:] != tail:
        return None
    return tuple(parts[len(head) : stop])
