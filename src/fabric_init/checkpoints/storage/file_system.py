"""Find the type of file system of a path: a local disk, or storage that many machines share."""

from __future__ import annotations

import os
from pathlib import Path

_NETWORK = frozenset(
    ["9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs"]
)


def file_system_of(path: str | os.PathLike[str], mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Return the type of the file system that ``path`` is on, as Linux names it (``"ext4"``, ``"nfs4"``).

    Return ``None`` where it is unknown, as on other systems. ``path`` need not exist.

    Args:
        path: links in it are followed.
        mounts: a table in the format of ``proc_pid_mountinfo(5)``.
    """
    try:
        table = mounts.read_text(encoding="utf-8", errors="surrogateescape")
        real = os.path.realpath(path)
    except OSError:
        return None
    longest: tuple[int, str] | None = None
    for line in table.splitlines():
        place, separator, what = line.partition(" - ")
        fields = place.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = _unescaped(fields[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and (longest is None or len(point) >= longest[0]):  # of two on one point the later one is on top
            longest = len(point), what.split(" ")[0]
    return None if longest is None else longest[1]


def _unescaped(field: str) -> str:
    for escape, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(escape, character)
    return field


def is_network(file_system: str | None) -> bool:
    """Return whether reads go over a network, which every ``fuse.…`` (sshfs, gcsfuse, JuiceFS) is assumed to do."""
    return file_system is not None and (file_system in _NETWORK or file_system.startswith("fuse."))
