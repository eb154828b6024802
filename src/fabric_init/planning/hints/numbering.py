"""Numbered parts of names (layers, experts, ``fc1``): which numbers both sides have, and which one has alone.

A layer that only one side has was added or dropped: nothing stands for it. Where each side has one that the other has
not, numbers may have been shifted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch

from fabric_init.planning.hints.name_similarity import Rivals, words_of

_Shapes = Mapping[str, torch.Size]
_Level = tuple[str, int]
_NUMBER = re.compile(r"\d+")
_MOST_DIGITS = 9
_MOST_PARTNERS = 8


class Numbering:
    """The numbers of every list, in the names of the model's tensors and in those of the checkpoint's keys.

    Args:
        ours: all names of the model.
        theirs: all keys, as renamed.
    """

    def __init__(self, ours: Iterable[str], theirs: Iterable[str]) -> None:
        self._ours, self._theirs = _lists(ours), _lists(theirs)
        self._orders: dict[tuple[str, str], dict[int, int]] = {}
        self._new: dict[str, set[int]] = {}
        """The numbers that only the model has, of lists that both have."""
        self._dropped: dict[str, set[int]] = {}
        """Those that only the checkpoint has."""
        self._others: defaultdict[str, list[str]] = defaultdict(list)
        """The lists that only the checkpoint has, by their last parts."""
        for place in self._theirs:
            if place not in self._ours:
                self._others[_ending(place)].append(place)
        for place, own in self._ours.items():
            there = self._theirs.get(place, set())
            if own != there and not own.isdisjoint(there):
                self._new[place], self._dropped[place] = own - there, there - own

    def apart(self, key: str, name: str) -> bool:
        """Return whether their numbers tell that a key is not meant for a tensor.

        So it is where they are of layers that only the checkpoint and only the model has, in two lists; and where their
        numbers differ but for an order that all of a list keeps.
        """
        numbers, others = _NUMBER.findall(key), _NUMBER.findall(name)
        if not numbers or not others:
            return False
        if len(numbers) == len(others) and numbers != others and _parts(key) != _parts(name):
            pairs = zip(_levels(key), _levels(name), strict=False)
            return not all(self._in_order(*pair) for pair in pairs if pair[0][1] != pair[1][1])
        return bool(self._new) and self.dropped(key) and self.new(name)

    def new(self, name: str) -> bool:
        """Return whether a tensor is of a layer that the checkpoint lacks, of a list that it has."""
        return any(number in self._new.get(place, ()) for place, number in _levels(name))

    def dropped(self, key: str) -> bool:
        """Return whether a key is of a layer that the model lacks, of a list that it has."""
        return any(number in self._dropped.get(place, ()) for place, number in _levels(key))

    def shifted(self, missing: _Shapes, offered: _Shapes) -> Iterator[Rivals]:
        """Yield missing tensors, and keys of their shapes, that differ in the number of a layer only one side has.

        One of the names may have parts before the other.
        """
        found: defaultdict[str, tuple[dict[str, None], dict[str, None]]] = defaultdict(lambda: ({}, {}))
        partners = {place: self._partners(place) for place, new in self._new.items() if new}
        for name, shape in missing.items():
            for (place, number), match in zip(_levels(name), _NUMBER.finditer(name), strict=False):
                if number not in self._new.get(place, ()):
                    continue
                for before, other in partners[place]:
                    key = f"{before}{other}{name[match.end() :]}"
                    if offered.get(key) == shape:
                        found[place][0][key] = found[place][1][name] = None
        for keys, names in found.values():
            yield Rivals((*keys,), (*names,), len(names))

    def _partners(self, place: str) -> list[_Level]:
        """Return the layers that only the checkpoint has, of the list ``place`` or of one with parts before it.

        Each as what is before its number, and the number. Of other lists those are left out that have the number of a
        layer that both sides have: they are second copies.
        """
        start = place.partition("{}")[0]
        found = [(start, number) for number in sorted(self._dropped[place])]
        shared = self._ours[place] & self._theirs[place]
        for other in self._others.get(_ending(place), ()):
            if other.endswith(f".{place}") or place.endswith(f".{other}"):
                start = other.partition("{}")[0]
                found += [(start, number) for number in sorted(self._theirs[other] - shared)]
        return found[:_MOST_PARTNERS]

    def _in_order(self, of_key: _Level, of_name: _Level) -> bool:
        """Return whether a number becomes another as in a list of which all keep their order, and shared ones stay."""
        pair = of_key[0], of_name[0]
        order = self._orders.get(pair)
        if order is None:
            theirs, ours = sorted(self._theirs.get(pair[0], ())), sorted(self._ours.get(pair[1], ()))
            order = dict(zip(theirs, ours, strict=True)) if len(theirs) == len(ours) else {}
            shared = set(theirs).intersection(ours) if pair[0] == pair[1] else ()
            if any(order.get(number) != number for number in shared):
                order = {}
            self._orders[pair] = order
        if not order and pair[0] != pair[1]:  # one list in another spelling, of which the model has more
            return words_of(pair[0].split(".")) == words_of(pair[1].split("."))
        return order.get(of_key[1]) == of_name[1]


def _ending(place: str) -> str:
    return place.rpartition(".")[2]


def _parts(name: str) -> list[str]:
    """Return the dotted parts that have a number, wherever in the name they are."""
    return sorted(part for part in name.split(".") if _NUMBER.search(part))


def _levels(name: str) -> Iterator[_Level]:
    """Yield the list that each number in a name is of, and the number."""
    for match in _NUMBER.finditer(name):
        if len(match[0]) <= _MOST_DIGITS:
            end = name.find(".", match.end())
            after = name[match.end() :] if end < 0 else name[match.end() : end]
            yield f"{name[: match.start()]}{{}}{after}", int(match[0])


def _lists(names: Iterable[str]) -> dict[str, set[int]]:
    lists: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        for place, number in _levels(name):
            lists[place].add(number)
    return dict(lists)
