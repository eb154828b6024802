"""Ctrl-C at a moment when nothing may be left half done: it waits until that is over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_held(then: Callable[[], None] | None = None) -> Iterator[Callable[[], None]]:
    """Context in which SIGINT only leaves word; at its end what the user has installed for it is called.

    It yields a function that calls it at once, if there was one, where that does no harm.

    Args:
        then: called instead, if there was one.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield (
            lambda: None
        )  # Python handles signals in the main thread; the other cases are ignored, or end the process at once
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))

    def deliver() -> None:
        if came:
            first = came[0]
            came.clear()
            before(*first)

    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, before)
        if came and then is not None:
            then()
        else:
            deliver()
