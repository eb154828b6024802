"""A checkpoint as a user names it: where it is, and how to read it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fabric_init.checkpoints.opening import open_checkpoint
from fabric_init.checkpoints.reader import CheckpointReader


@dataclass(frozen=True)
class Source:
    """What :func:`~fabric_init.checkpoints.opening.open_checkpoint` is to be called with."""

    path: str | os.PathLike[str]
    mmap: bool = True
    entry: str | None = None
    manifest: str | os.PathLike[str] | None = None

    def open(self, *, copy: bool = False) -> CheckpointReader:
        """Open it; with ``copy``, not mapped in any case."""
        return open_checkpoint(self.path, mmap=self.mmap and not copy, entry=self.entry, manifest=self.manifest)
