"""Python's cyclic garbage collector rests while a model is built or filled.

Thousands of objects come to life there, and all of them stay: looking for garbage among them finds none, and with a
large program loaded one full pass takes longer than recording a model of a billion parameters.
"""

from __future__ import annotations

import gc
from types import TracebackType

from typing_extensions import Self


class PausedCollector:
    """Context without automatic garbage collection; reference counting goes on, and nesting is fine."""

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._was_enabled:
            gc.enable()
