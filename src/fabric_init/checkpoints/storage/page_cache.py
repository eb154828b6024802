"""Have the operating system read parts of local files into its cache, before they are touched or asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_STEP_BYTES = 1 << 20
"""Linux cuts one request down to a few MiB on usual disks, and says nothing."""


def begin_reading(path: Path, start: int, stop: int) -> None:
    """Have bytes ``start:stop`` read, without waiting for them where the system has a call for that.

    What goes wrong is ignored: whoever reads the bytes will see it.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            if hasattr(os, "posix_fadvise"):
                for at in range(start, stop, _STEP_BYTES):
                    os.posix_fadvise(descriptor, at, min(_STEP_BYTES, stop - at), os.POSIX_FADV_WILLNEED)
            else:
                os.lseek(descriptor, start, os.SEEK_SET)
                while start < stop and (got := len(os.read(descriptor, min(_STEP_BYTES, stop - start)))):
                    start += got
        finally:
            os.close(descriptor)


class BackgroundReading:
    """A thread that has parts of files read, one after the other, and ends by itself.

    It stops early when they would take half of the memory that is left: then the first of them would be dropped before
    anybody touches them.
    """

    def __init__(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(parts,), name="fabric_init read-ahead", daemon=True).start()

    def stop(self) -> None:
        """Begin no more parts."""
        self._stopped.set()

    def _run(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        left = _available_bytes() // 2
        for path, start, stop in parts:
            left -= stop - start
            if left < 0 or self._stopped.is_set():
                return
            begin_reading(path, start, stop)


def _available_bytes(table: Path = Path("/proc/meminfo")) -> int:
    """Return the memory that the system can give, its cache included; a very large number where it is unknown."""
    with suppress(OSError, ValueError, IndexError):
        for line in table.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62
