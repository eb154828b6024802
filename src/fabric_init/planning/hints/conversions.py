"""Suggest conversions for a checkpoint that does not match the model, where both names and shapes fit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations

import torch

from fabric_init.checkpoints.mapping.convert import Conversion, Fuse, Split, Transpose

_Shapes = Mapping[str, torch.Size]


def likely_conversions(missing: _Shapes, unexpected: _Shapes) -> list[str]:
    """Return sentences, each with a conversion that makes missing tensors of unexpected ones, the most useful first.

    It looks for :class:`~fabric_init.checkpoints.Fuse` and :class:`~fabric_init.checkpoints.Split` along the first
    dimension, of siblings whose names make up the joined one's (q, k and v to ``qkv_proj``; gate and up).
    """
    counts: Counter[str] = Counter()
    for joined, parts in _families(missing, unexpected):
        fuse = Fuse([_tail(part) for part in parts], into=_tail(joined))
        counts[_declared(fuse, parts)] += 1
    for joined, parts in _families(unexpected, missing):
        sizes = [missing[part][0] for part in parts]
        into = [_tail(part) for part in parts]
        split = Split(_tail(joined), into=into, sizes=sizes if len(set(sizes)) > 1 else None)
        counts[_declared(split, parts)] += len(parts)
    return [
        f"{declared} makes {'all' if count == len(missing) else f'{count} of'} {len(missing)} missing tensors"
        for declared, count in counts.most_common(4)
    ]


def likely_transposes(mismatched: Mapping[str, tuple[torch.Size, torch.Size]]) -> Conversion | None:
    """Return the conversion for keys whose shape in the checkpoint is the model's transposed; ``None`` for none."""
    turned = {
        _tail(key): None
        for key, (model, file) in mismatched.items()
        if len(file) == 2 and tuple(model) == (*file[::-1],)
    }
    return Transpose(list(turned)) if turned else None


def _declared(conversion: Conversion, parts: Sequence[str]) -> str:
    by_head = " (with groups=the number of heads if q, k and v take turns there)" if len(parts) == 3 else ""
    return f"convert=[{conversion}]{by_head}"


def _tail(name: str) -> str:
    """Return the last two parts of a name, the module's and its tensor's: a pattern for all layers."""
    return ".".join(name.split(".")[-2:])


def _families(joined: _Shapes, apart: _Shapes) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each joined tensor, and the siblings, in order, that make it up."""
    siblings: defaultdict[tuple[str, str, torch.Size], list[str]] = defaultdict(list)
    for name, shape in apart.items():
        if len(shape):
            siblings[(*_place(name), shape[1:])].append(name)
    for name, shape in joined.items():
        if not len(shape):
            continue
        candidates = siblings.get((*_place(name), shape[1:]), ())
        for parts in (*permutations(candidates[:6], 3), *permutations(candidates[:6], 2)):
            if sum(apart[part][0] for part in parts) == shape[0] and _makes_up(parts, name):
                yield name, parts
                break


def _place(name: str) -> tuple[str, str]:
    """Return the name of the module's parent, and the name of its tensor."""
    parent, _, leaf = name.rpartition(".")
    return parent.rpartition(".")[0], leaf


def _makes_up(parts: Sequence[str], joined: str) -> bool:
    """Return whether the names of ``parts``, without their common words, follow one another in the joined name."""
    words = [_tail(part).split(".")[0].split("_") for part in parts]
    common = set(words[0]).intersection(*words[1:])
    stems = ["".join(word for word in own if word not in common) for own in words]
    rest = "".join(word for word in _tail(joined).split(".")[0].split("_") if word not in common)
    return all(stems) and "".join(stems) in rest
