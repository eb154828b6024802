"""Match many keys by one pattern: the end of a key, with ``{}`` for parts that differ."""

from __future__ import annotations

import re
from typing import NamedTuple


class Match(NamedTuple):
    """The parts of a key that its pattern leaves open: all that comes before, and one dotted part for each ``{}``."""

    head: str
    blanks: tuple[str, ...]


class KeyPattern:
    """A pattern such as ``"experts.{}.w1.weight"``: any key that ends so, at a dot. ``{}`` matches one dotted part.

    Raises:
        ValueError: the pattern is empty.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"a key's name is a string, not {text!r}")
        if not text.strip("."):
            raise ValueError("an empty name stands for no key: give the end of one, such as 'qkv_proj.weight'")
        self.text = text
        self.blanks = text.count("{}")
        tail = r"([^.]+)".join(map(re.escape, text.split("{}")))
        self._regex = re.compile(rf"((?:.*\.)?){tail}", re.DOTALL)

    def match(self, key: str) -> Match | None:
        """Match a key; ``None`` if it does not fit."""
        match = self._regex.fullmatch(key)
        return Match(match[1], match.groups()[1:]) if match else None

    def key(self, match: Match) -> str:
        """Return the key with this match: the inverse of :meth:`match`."""
        parts = self.text.split("{}")
        return match.head + parts[0] + "".join(map("".join, zip(match.blanks, parts[1:], strict=True)))
