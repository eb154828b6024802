"""What a process holds in memory, as Linux counts it, and its peak while something runs.

*private* is anonymous memory (``RssAnon``): what was allocated, or written to in a private map. The kernel cannot take
it back without swap, and no other process can share it. Clean pages of a memory-mapped checkpoint are not in it: they
are the page cache, there once for all the processes that map the file. *total* is the whole resident set, those
pages included.
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


def now(pid: int) -> Memory:
    """The exact counts: walks the page tables, so only while the process stands still."""
    fields = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return Memory(private=fields["Anonymous"], total=fields["Rss"])


def reset_peak(pid: int) -> None:
    """Set the kernel's own high-water mark of the resident set back to the present."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class MemoryWatch:
    """While in the block: the peak of both figures.

    The kernel keeps a high-water mark of the total. It keeps none of the private part, so that is sampled, and read
    exactly once more at the end, when the process waits.
    """

    def __init__(self, pid: int) -> None:
        self.private = self.total = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        try:
            end = now(self._pid)
            high_water = _fields(Path(f"/proc/{self._pid}/status").read_text())["VmHWM"]
        except (OSError, KeyError):  # the process died; its samples stand
            return
        self.private = max(self.private, end.private)
        self.total = max(self.total, end.total, high_water)

    def _sample(self) -> None:
        status = Path(f"/proc/{self._pid}/status")
        while not self._stop.wait(INTERVAL_S):
            try:
                self.private = max(self.private, _fields(status.read_text())["RssAnon"])
            except (OSError, KeyError):
                return


def _fields(text: str) -> dict[str, int]:
    """``Name:   12 kB`` lines, in bytes."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[name] = int(value[:-3]) * 1024
    return fields
