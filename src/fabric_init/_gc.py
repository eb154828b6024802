"""Python's cyclic garbage collector rests while a model is built or filled.

Thousands of objects come to life there, and all of them stay: looking for garbage among them finds none, and with a
large program loaded one full pass takes longer than recording a model of a billion parameters. Nor is it looked for
as soon as the collector works again: what has come to life is old by then, as if passes had found it in use.
"""

from __future__ import annotations

import gc
from types import TracebackType
from typing import ClassVar

from typing_extensions import Self


class PausedCollector:
    """Context without automatic garbage collection; reference counting goes on, and nesting is fine."""

    _some_are_frozen: ClassVar[bool] = False
    """To count frozen objects takes as long as to go through them: not again, once there were some."""

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._was_enabled:
            PausedCollector._some_are_frozen = PausedCollector._some_are_frozen or gc.get_freeze_count() > 0
            if not PausedCollector._some_are_frozen:  # what the user has frozen stays so
                gc.freeze()
                gc.unfreeze()  # into the oldest generation
            gc.enable()
