"""Read the file of ``fabric.load_raw`` by pages, so that loading a model does not take memory for a second one."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.strategies.strategy import Strategy


class MappedCheckpointIO(TorchCheckpointIO):
    """Lightning's reader of ``torch.save`` files, but for local files in today's format: those are mapped, not read."""

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> Any:
        file = Path(path)
        if not (file.is_file() and zipfile.is_zipfile(file)):
            return super().load_checkpoint(path, map_location, weights_only)
        return torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)


@contextmanager
def mapped_io(strategy: Strategy) -> Iterator[None]:
    """Context in which a strategy that reads in Lightning's own way reads mapped files."""
    try:
        own = strategy.checkpoint_io
    except NotImplementedError:  # a strategy that reads in a way of its own
        own = None
    if type(own) is not TorchCheckpointIO:
        yield
        return
    strategy.checkpoint_io = MappedCheckpointIO()
    try:
        yield
    finally:
        strategy.checkpoint_io = own
