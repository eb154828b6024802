"""A progress bar for fills that take longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
_QUIET_S = 2.0


def with_progress(items: Iterable[_T], total: int) -> Generator[_T, None, None]:
    """Yield ``items``, and show a progress bar after two seconds. Until then not even the bar's lock is made."""
    start = time.monotonic()
    bar: tqdm[Any] | None = None
    try:
        for done, item in enumerate(items):
            yield item
            if bar is not None:
                bar.update()
            elif time.monotonic() - start > _QUIET_S:
                bar = tqdm(total=total, initial=done + 1, desc="filling", unit="tensor")
    finally:
        if bar is not None:
            bar.close()
