"""How many bytes of the checkpoint a process has read, by ``read`` or through a map: the same count for both.

* ``read`` and its like are counted by Linux (``rchar`` in ``/proc/PID/io``); what gloo's sockets bring is not in it.
* What is touched in a mapped file is counted nowhere, but each page that is touched enters the process's page table
  and stays there until the file is unmapped. So the climbs of ``RssFile`` are summed, sampled each millisecond, less
  the pages of other mapped files (libraries), which are looked up when the process waits.

A touched page brings its neighbors along: 64 KiB in all (``fault_around_bytes``), or the whole entry of the page cache
that it is in, up to 2 MB. So count when the cache is warmed in small pages; then each end of a part that is read in a
map counts at most 60 KiB too much.
"""

from __future__ import annotations

from pathlib import Path


class BytesRead:
    """What has been read since this was made, when the process waited; ask when it waits again."""

    def __init__(self, pid: int, checkpoint: Path) -> None:
        self._pid = pid
        self._checkpoint = str(checkpoint.resolve()) + "/"
        self._read, self._other = self._read_calls(), self._other_files()

    def so_far(self, climbed: int) -> int:
        """``climbed``: how far the pages of mapped files climbed meanwhile."""
        return self._read_calls() - self._read + max(0, climbed - (self._other_files() - self._other))

    def _read_calls(self) -> int:
        return int(Path(f"/proc/{self._pid}/io").read_text().split(maxsplit=2)[1])

    def _other_files(self) -> int:
        """Resident pages of mapped files outside the checkpoint's folder, in bytes; walks the page tables."""
        total, counts = 0, False
        for line in Path(f"/proc/{self._pid}/smaps").read_text().splitlines():
            name, *values = line.split(maxsplit=5)
            if not name.endswith(":"):  # a mapping: its range, permissions, offset, device, inode, and its file
                path = values[4] if len(values) == 5 else ""
                counts = path.startswith("/") and not path.startswith((self._checkpoint, "/dev/"))
            elif counts and name in ("Rss:", "Anonymous:"):
                total += (1 if name == "Rss:" else -1) * int(values[0]) * 1024
        return total
