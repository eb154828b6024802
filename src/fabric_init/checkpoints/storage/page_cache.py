"""Have the operating system read parts of local files into its cache, before they are touched."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path

_STEP_BYTES = 1 << 20
"""Linux cuts one request down to a few MiB on usual disks, and says nothing."""
_SAMPLES = 64
"""If so many bytes, spread evenly, are in the cache, then nearly all are: to look takes a tenth of a millisecond."""


def is_cached(parts: Sequence[tuple[Path, int, int]]) -> bool:
    """Return whether parts of files are in the system's cache, by samples; ``False`` where the system cannot tell."""
    step = max(1, sum(stop - start for _, start, stop in parts) // _SAMPLES)
    byte, after = bytearray(1), 0  # the next sample comes after so many bytes
    try:
        for path, of_file in groupby(parts, itemgetter(0)):
            with FileIO(path) as file:
                for _, start, stop in of_file:
                    places = range(start + after, stop, step)
                    after += len(places) * step - (stop - start)
                    for at in places:
                        os.preadv(file.fileno(), [byte], at, os.RWF_NOWAIT)
    except (OSError, AttributeError):
        return False
    return True


class BackgroundReading:
    """A thread that has parts of files read, one after the other, and ends by itself.

    It stops early when they would take half of the memory that is left: then the first of them would be dropped before
    anybody touches them. What goes wrong is ignored: whoever touches the bytes will see it.
    """

    def __init__(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        self._stopped = False
        with suppress(RuntimeError):  # this process can start no thread
            threading.Thread(target=self._run, args=(parts,), name="fabric_init read-ahead", daemon=True).start()

    def stop(self) -> None:
        """Begin no more parts."""
        self._stopped = True

    def _run(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        left = available_bytes() // 2
        with suppress(OSError):
            for path, start, stop in _joined(parts):
                with FileIO(path) as file:
                    for at in range(start, stop, _STEP_BYTES):
                        count = min(_STEP_BYTES, stop - at)
                        left -= count
                        if left < 0 or self._stopped:
                            return
                        _begin(file, at, count)


def _joined(parts: Iterable[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, int]]:
    """Yield parts, those together that touch or overlap."""
    path, start, stop = None, 0, 0
    for its, first, last in parts:
        if its == path and start <= first <= stop:
            stop = max(stop, last)
            continue
        if path is not None:
            yield path, start, stop
        path, start, stop = its, first, last
    if path is not None:
        yield path, start, stop


def _begin(file: FileIO, start: int, count: int) -> None:
    """Have bytes read; wait for them only where the system has no call for that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_WILLNEED)
    else:
        file.seek(start)
        file.read(count)


def available_bytes(table: Path = Path("/proc/meminfo")) -> int:
    """Return the memory that the system can give, its cache included; a very large number where it is unknown."""
    with suppress(OSError, ValueError, IndexError):
        for line in table.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62
