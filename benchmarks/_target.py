"""A figure that we hold ourselves to, and the line that says whether a run met it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """``figure`` is None where a contender failed and there is nothing to judge: that is a miss too."""

    text: str
    figure: float | None
    bound: Literal["at most", "below", "at least"]
    limit: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        if self.figure is None:
            return False
        return {
            "at most": self.figure <= self.limit,
            "below": self.figure < self.limit,
            "at least": self.figure >= self.limit,
        }[self.bound]

    def __str__(self) -> str:
        figure = "no figure" if self.figure is None else f"{self.figure:.3g} {self.unit}"
        verdict = "PASS" if self.met else "MISS"
        return f"{verdict}  {self.text}: {figure} (target {self.bound} {self.limit:g} {self.unit})"


def ratio(figure: float | None, over: float | None) -> float | None:
    return figure / over if figure is not None and over else None
