"""What a process holds in memory, as Linux counts it, and its peak while something runs.

*private* is anonymous memory (``RssAnon``): what was allocated, or written to in a private map. The kernel cannot take
it back without swap, and no other process can share it. Clean pages of a memory-mapped checkpoint are not in it: they
are the page cache, there once for all the processes that map the file. *total* is the whole resident set, those
pages included. *shared fairly* (``Pss``) counts a page that n processes map as 1/n, so that the sum over processes is
what they take of the machine together.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

INTERVAL_S = 0.001


@dataclass(frozen=True)
class Memory:
    private: int
    total: int
    shared_fairly: int


def now(pid: int) -> Memory:
    """The exact counts: walks the page tables, so only while the process stands still."""
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Memory(private=fields["Anonymous"], total=fields["Rss"], shared_fairly=fields["Pss"])


def reset_peak(pid: int) -> None:
    """Set the kernel's own high-water mark of the resident set back to the present."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class MemoryWatch:
    """While in the block: the peak of both figures, and how far the pages of mapped files have climbed in all.

    The kernel keeps a high-water mark of the total. It keeps none of the others, so those are sampled, and read once
    more at the end, when the process waits; ``shared_fairly`` is read only then.
    """

    def __init__(self, pid: int) -> None:
        self.private = self.total = self.shared_fairly = 0
        self.mapped = Climbs()
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        # while the process still waits: a phase of a few milliseconds may be over before the first sample
        self.mapped.see(_fields(Path(f"/proc/{self._pid}/status").read_text())["RssFile"])
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            end = now(self._pid)
            status = _fields(Path(f"/proc/{self._pid}/status").read_text())
        except (OSError, KeyError):  # the process died; its samples stand
            return
        self.private = max(self.private, end.private)
        self.total = max(self.total, end.total, status["VmHWM"])
        self.shared_fairly = end.shared_fairly
        self.mapped.see(status["RssFile"])

    def _sample(self) -> None:
        status = Path(f"/proc/{self._pid}/status")
        while True:
            try:
                fields = _fields(status.read_text())
                self.private = max(self.private, fields["RssAnon"])
                self.mapped.see(fields["RssFile"])
            except (OSError, KeyError):
                return
            if self._stop.wait(INTERVAL_S):
                return


class Climbs:
    """The sum of all rises of a figure that is looked at again and again.

    A file that is mapped, read through and unmapped leaves nothing in the end, but has made its pages rise. Falls
    smaller than ``SLACK`` are taken for noise: the kernel's counters are spread over its processors.
    """

    SLACK = 4 << 20

    def __init__(self) -> None:
        self.sum = 0
        self._level: int | None = None

    def see(self, value: int) -> None:
        if self._level is None or value < self._level - self.SLACK:
            self._level = value
        elif value > self._level:
            self.sum += value - self._level
            self._level = value


def _fields(text: str) -> dict[str, int]:
    """``Name:   12 kB`` lines, in bytes."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3]) * 1024
    return fields
