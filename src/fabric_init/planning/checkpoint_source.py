"""A checkpoint as a user names it: where it is, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fabric_init.checkpoints import CheckpointReader, open_checkpoint
from fabric_init.errors import OptionError
from fabric_init.planning.recorded_load.converted import Convert, converted


@dataclass(frozen=True)
class CheckpointSource:
    """The arguments of :func:`~fabric_init.checkpoints.open_checkpoint`, and conversions of its result."""

    path: str | os.PathLike[str]
    mmap: bool = True
    entry: str | None = None
    manifest: str | os.PathLike[str] | None = None
    convert: Convert = ()

    def __post_init__(self) -> None:
        if isinstance(self.path, Mapping):
            raise OptionError(
                "checkpoint= takes the path of a checkpoint, not a state dict: for one in memory, call "
                "model.load_state_dict(state_dict)"
            )

    def open(self, *, copy: bool = False) -> CheckpointReader:
        """Open it; with ``copy``, without a map in any case."""
        mmap = self.mmap and not copy
        return converted(open_checkpoint(self.path, mmap=mmap, entry=self.entry, manifest=self.manifest), self.convert)
