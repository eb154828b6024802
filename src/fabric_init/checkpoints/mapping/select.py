"""Values for ``rename=`` that select one part of a larger checkpoint, or some of its layers; other keys are dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fabric_init.errors import CheckpointMismatchError


@dataclass(frozen=True)
class Part:
    """Select the keys that begin with ``prefix``, and replace it by ``into``; all other keys are dropped.

    ``Part("encoder.")`` loads the encoder of a larger model; ``Part("", into="encoder.")`` loads all of a checkpoint
    into one submodule.
    """

    prefix: str
    into: str = ""

    def __str__(self) -> str:
        return f"Part({self.prefix!r}{f', into={self.into!r}' if self.into else ''})"

    def __call__(self, key: str) -> str | None:
        return self.into + key.removeprefix(self.prefix) if key.startswith(self.prefix) else None

    def check(self, keys: Collection[str]) -> None:
        """Raise :class:`~fabric_init.errors.CheckpointMismatchError` if there is no such key."""
        if not any(key.startswith(self.prefix) for key in keys):
            starts = Counter(key.partition(".")[0] + "." * ("." in key) for key in keys)
            listed = ", ".join(f"{start!r} ({count})" for start, count in starts.most_common(8))
            raise CheckpointMismatchError(f"{self}: no key begins so; they begin with {listed or 'nothing'}")


@dataclass(frozen=True)
class Layers:
    """Map some of the checkpoint's layers to the model's; keys of other layers are dropped, keys of no layer are kept.

    Args:
        chosen: the checkpoint's layers in the order of the model's, ``[0, 4, 8]`` or ``range(8)``; or a mapping from
            the checkpoint's number to the model's.
        at: how keys number layers: ``"layers.{}"``, ``"encoder.layer.{}"``, ``"h.{}"``. Counted is its first occurrence
            in a key, between dots.

    Raises:
        ValueError: a layer is chosen twice, or ``at`` has not exactly one ``{}``.
    """

    chosen: Mapping[int, int] | Sequence[int]
    at: str = "layers.{}"
    _onto: dict[int, int] = field(init=False, repr=False)
    _pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        old = list(self.chosen)
        new = list(self.chosen.values()) if isinstance(self.chosen, Mapping) else list(range(len(old)))
        if not old or len(set(old)) < len(old) or len(set(new)) < len(new):
            raise ValueError(f"{self}: name at least one layer, and each once")
        before, blank, after = self.at.strip(".").partition("{}")
        if not blank or "{}" in after:
            raise ValueError(f"{self}: at should have one {{}} where the number is, as in 'layers.{{}}'")
        object.__setattr__(self, "_onto", dict(zip(old, new, strict=True)))
        pattern = rf"((?:^|\.){re.escape(before)})(\d{{1,9}})(?={re.escape(after)}(?:\.|$))"
        object.__setattr__(self, "_pattern", re.compile(pattern))

    def __str__(self) -> str:
        chosen = self.chosen if isinstance(self.chosen, (Mapping, range)) else list(self.chosen)
        return f"Layers({chosen}, at={self.at!r})"

    def __call__(self, key: str) -> str | None:
        match = self._pattern.search(key)
        if match is None:
            return key
        onto = self._onto.get(int(match[2]))
        return None if onto is None else f"{key[: match.end(1)]}{onto}{key[match.end() :]}"

    def check(self, keys: Collection[str]) -> None:
        """Raise :class:`~fabric_init.errors.CheckpointMismatchError` if a chosen layer is not there."""
        there = {int(match[2]) for key in keys if (match := self._pattern.search(key)) is not None}
        lacking = [number for number in self._onto if number not in there]
        if not there:
            numbered = Counter(match[1] + ".{}" for key in keys if (match := re.match(r"(.*?\D)\.\d+\.", key)))
            listed = ", ".join(repr(name) for name, _ in numbered.most_common(5))
            hint = f"layers seem to be at {listed}" if listed else "no key has a number between dots"
            raise CheckpointMismatchError(f"{self}: no key has {self.at!r} in it; {hint}")
        if lacking:
            raise CheckpointMismatchError(
                f"{self}: there is no layer {', '.join(map(str, lacking))}; there are {len(there)}, "
                f"{min(there)} to {max(there)}"
            )
