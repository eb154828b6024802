"""When our log says what, which tells how long each step of ours has taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def times_in_log(*channels: str) -> Iterator[list[float]]:
    """Context in which the time of each message of these channels of ``fabric_init`` is noted, in order."""
    times: list[float] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: times.append(time.perf_counter())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"fabric_init.{channel}") for channel in channels]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        yield times
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
