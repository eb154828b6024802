"""What may go wrong on one rank, and when."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import fabric_init

_PACKAGE = str(Path(fabric_init.__file__).parent)


class InjectedError(Exception):
    """An error that nobody expects."""


def _raising(make: Callable[[], BaseException]) -> Callable[[], NoReturn]:
    def act() -> NoReturn:
        raise make()

    return act


def _no_more_descriptors() -> None:
    there = [int(name) for name in os.listdir("/proc/self/fd")]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(there) + 1, most))


def _no_more_threads() -> None:
    def start(self: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = start  # type: ignore[method-assign]


ACTS: Mapping[str, Callable[[], Any]] = {
    "an exception": _raising(lambda: InjectedError("injected")),
    "SystemExit": _raising(lambda: SystemExit("told to stop")),
    "CancelledError": _raising(lambda: asyncio.CancelledError("cancelled")),
    "GeneratorExit": _raising(lambda: GeneratorExit("closed")),
    "MemoryError": _raising(lambda: MemoryError("no memory")),
    "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exits": lambda: os._exit(3),
    "sleeps": lambda: time.sleep(1.5),
    "sleeps too long": lambda: time.sleep(13),
    "out of descriptors": _no_more_descriptors,
    "out of threads": _no_more_threads,
}
DEADLY = ("killed", "exits")


def at_call(number: int, act: Callable[[], Any]) -> None:
    """Let ``act`` happen when this thread makes its call ``number``, from now on, of a function of the package."""
    count = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        if event != "call" or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        count += 1
        if count == number:
            sys.setprofile(None)
            act()

    sys.setprofile(watch)
