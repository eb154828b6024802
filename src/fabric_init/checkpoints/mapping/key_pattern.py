"""Names for many keys at once: the end of a key, with ``{}`` for what differs."""

from __future__ import annotations

import re
from typing import NamedTuple


class Match(NamedTuple):
    """What a key has beyond its pattern: all that comes before, and one dotted part for each ``{}``."""

    head: str
    blanks: tuple[str, ...]


class KeyPattern:
    """``"experts.{}.w1.weight"``: any key that ends so, at a dot. Each ``{}`` stands for one dotted part.

    Raises ``ValueError`` for an empty pattern.
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
        """How the key fits; ``None`` when it does not."""
        found = self._regex.fullmatch(key)
        return Match(found[1], found.groups()[1:]) if found else None

    def key(self, match: Match) -> str:
        """The key that fits in this way: the inverse of :meth:`match`."""
        parts = self.text.split("{}")
        return match.head + parts[0] + "".join(map("".join, zip(match.blanks, parts[1:], strict=True)))
