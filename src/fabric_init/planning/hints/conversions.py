"""Suggest conversions for a checkpoint that does not match the model, where both names and shapes fit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch

from fabric_init.checkpoints.mapping.convert import Conversion, Fuse, Split, Stack, Transpose, Unstack
from fabric_init.planning.hints.name_similarity import likeness, words_of

_Shapes = Mapping[str, torch.Size]
_MOST = 4


class Candidate(NamedTuple):
    """Conversions that belong together, and how many missing tensors they would make."""

    conversions: tuple[Conversion, ...]
    makes: int
    by_head: bool = False
    """Whether q, k and v are among them, which may take turns head by head."""

    def sentence(self, makes: int, missing: int) -> str:
        """Return what is to be declared, and what it would do."""
        turns = " (with groups=the number of heads if q, k and v take turns there)" if self.by_head else ""
        count = "all" if makes == missing else f"{makes} of"
        return f"convert=[{', '.join(map(str, self.conversions))}]{turns} makes {count} {missing} missing tensors"


def likely_conversions(missing: _Shapes, unexpected: _Shapes) -> list[str]:
    """Return sentences, each with conversions that make missing tensors of unexpected ones, the most useful first."""
    return [found.sentence(found.makes, len(missing)) for found in candidates(missing, unexpected)]


def candidates(missing: _Shapes, unexpected: _Shapes, key_of: Mapping[str, str] | None = None) -> list[Candidate]:
    """Return conversions that make missing tensors of unexpected ones, the most useful first.

    It looks for :class:`~fabric_init.checkpoints.Fuse` and :class:`~fabric_init.checkpoints.Split` along the first
    dimension, of siblings whose names make up the joined one's (q, k and v to ``qkv_proj``; gate and up); and for
    numbered siblings (experts) that are stacked, or fused and stacked, or the reverse.

    Args:
        missing: tensors of the model.
        unexpected: checkpoint keys, as renamed.
        key_of: the keys as they are in the checkpoint, where conversions come before renames.
    """
    keys = key_of or {}
    counts: Counter[tuple[str, int]] = Counter()  # by their text: they have no hash
    made: dict[str, tuple[Conversion, ...]] = {}

    def count(conversions: tuple[Conversion, ...], parts: int, makes: int) -> None:
        made.setdefault(text := repr(conversions), conversions)
        counts[text, parts] += makes

    for joined, parts in _families(missing, unexpected):
        count((Fuse([_tail(keys.get(part, part)) for part in parts], into=_tail(joined)),), len(parts), 1)
    for joined, parts in _families(unexpected, missing):
        sizes = [missing[part][0] for part in parts]
        into = [_tail(part) for part in parts]
        split = Split(_tail(keys.get(joined, joined)), into=into, sizes=sizes if len(set(sizes)) > 1 else None)
        count((split,), len(parts), len(parts))
    for stack, container, rests in _stacks(missing, unexpected):
        count(_stacked(stack, container, rests, keys), 0, 1)
    for stack, container, rests in _stacks(unexpected, missing):
        count(_unstacked(stack, container, rests, missing, keys), 0, len(rests) * unexpected[stack][0])
    return [Candidate(made[text], makes, parts == 3) for (text, parts), makes in counts.most_common(_MOST)]


def transposing(keys: Collection[str], there: Iterable[str]) -> Transpose:
    """Return the conversion of ``keys``, by their ends where no other key that is ``there`` ends so."""
    others: Counter[str] = Counter(map(_tail, there))
    own: defaultdict[str, list[str]] = defaultdict(list)
    for key in keys:
        own[_tail(key)].append(key)
    return Transpose([name for tail, its in own.items() for name in ([tail] if len(its) == others[tail] else its)])


def _tail(name: str, parts: int = 2) -> str:
    """Return the last parts of a name, the module's and its tensor's: a pattern for all layers."""
    return ".".join(name.split(".")[-parts:])


def _families(joined: _Shapes, apart: _Shapes) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield each joined tensor, and the siblings, in order, that make it up."""
    siblings: defaultdict[tuple[str, str, torch.Size], list[str]] = defaultdict(list)
    for name, shape in apart.items():
        if len(shape):
            siblings[(*_place(name), shape[1:])].append(name)
    for name, shape in joined.items():
        if not len(shape):
            continue
        siblings_here = siblings.get((*_place(name), shape[1:]), ())
        for parts in (*permutations(siblings_here[:6], 3), *permutations(siblings_here[:6], 2)):
            own = [_tail(part).split(".")[0] for part in parts]
            if sum(apart[part][0] for part in parts) == shape[0] and _makes_up(own, _tail(name).split(".")[0]):
                yield name, parts
                break


def _place(name: str) -> tuple[str, str]:
    """Return the name of the module's parent, and the name of its tensor."""
    parent, _, leaf = name.rpartition(".")
    return parent.rpartition(".")[0], leaf


def _makes_up(parts: Sequence[str], joined: str) -> bool:
    """Return whether the names of ``parts``, without their common words, follow one another in the joined name."""
    words = [part.split("_") for part in parts]
    common = set(words[0]).intersection(*words[1:])
    stems = ["".join(word for word in own if word not in common) for own in words]
    rest = "".join(word for word in joined.split("_") if word not in common)
    return all(stems) and "".join(stems) in rest


# -- experts: numbered siblings, of which the other side has one tensor ------------------------------------------------


def _stacks(stacked: _Shapes, apart: _Shapes) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield each tensor, the name of what is numbered, and what follows the number: of one part, or of two in order."""
    numbered: defaultdict[str, defaultdict[str, dict[int, torch.Size]]] = defaultdict(lambda: defaultdict(dict))
    for name, shape in apart.items():
        parts = name.split(".")
        at = next((at for at in range(len(parts) - 2, 0, -1) if parts[at].isdecimal()), None)
        if at is not None:
            numbered[".".join(parts[:at])][".".join(parts[at + 1 :])][int(parts[at])] = shape
    for name, shape in stacked.items():
        parent = name.rpartition(".")[0]
        container = next((place for place in (parent, parent.rpartition(".")[0]) if place in numbered), None)
        if container is None or not len(shape):
            continue
        alike = {
            rest: shapes[0]
            for rest, shapes in numbered[container].items()
            if shapes.keys() == set(range(shape[0])) and len(set(shapes.values())) == 1
        }
        own = name.removeprefix(f"{container}.")
        rests = _whole(alike, own, shape) or _halves(alike, own, shape)
        if rests:
            yield name, container, rests


def _whole(alike: _Shapes, own: str, shape: torch.Size) -> tuple[str, ...]:
    """Return what follows the number of the parts that are of the stacked tensor's shape and most like its name."""
    likely = sorted(
        ((likeness(rest.split("."), own.split(".")), rest) for rest in alike if alike[rest] == shape[1:]), reverse=True
    )
    if not likely or not likely[0][0] or (len(likely) > 1 and likely[0][0] == likely[1][0]):
        return ()
    return (likely[0][1],)


def _halves(alike: _Shapes, own: str, shape: torch.Size) -> tuple[str, ...]:
    """Return what follows the number of two parts that make up the stacked tensor along its second dimension."""
    fitting = [rest for rest in alike if len(alike[rest]) == len(shape) - 1 > 0 and alike[rest][1:] == shape[2:]]
    joined = "_".join(words_of(own.split(".")))
    for pair in permutations(fitting[:6], 2):
        names = ["_".join(words_of(rest.split("."))) for rest in pair]
        if sum(alike[rest][0] for rest in pair) == shape[1] and _makes_up(names, joined):
            return pair
    return ()


def _stacked(stack: str, container: str, rests: Sequence[str], keys: Mapping[str, str]) -> tuple[Conversion, ...]:
    into = stack.removeprefix(f"{container.rpartition('.')[0]}.")
    sources = [_pattern(keys.get(part := f"{container}.0.{rest}", part), rest) for rest in rests]
    if len(sources) == 1:
        return (Stack(sources[0], into=into),)
    between = f"{sources[0].partition('{}')[0]}{{}}.{stack.removeprefix(f'{container}.')}"
    return Fuse(sources, into=between), Stack(between, into=into)


def _unstacked(
    stack: str, container: str, rests: Sequence[str], missing: _Shapes, keys: Mapping[str, str]
) -> tuple[Conversion, ...]:
    own, name = stack.removeprefix(f"{container}."), container.rpartition(".")[2]
    source = _tail(keys.get(stack, stack), own.count(".") + 2)
    into = [f"{name}.{{}}.{rest}" for rest in rests]
    if len(into) == 1:
        return (Unstack(source, into=into[0]),)
    sizes = [missing[f"{container}.0.{rest}"][0] for rest in rests]
    between = f"{name}.{{}}.{own}"
    return Unstack(source, into=between), Split(between, into=into, sizes=sizes if len(set(sizes)) > 1 else None)


def _pattern(key: str, rest: str) -> str:
    """Return the pattern of a key with the number 0 before as many parts as ``rest`` has."""
    *_, container, _ = (parts := key.split("."))[: len(parts) - rest.count(".") - 1]
    return ".".join([container, "{}", *parts[len(parts) - rest.count(".") - 1 :]])
