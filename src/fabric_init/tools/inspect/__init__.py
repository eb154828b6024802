"""Inspect a checkpoint: its contents and damage, from its header and, on request, from its values.

:func:`inspect` continues after errors: where a reader of :mod:`fabric_init.checkpoints` refuses a damaged file, it
lists which tensors are sound and which are not.
"""

from __future__ import annotations

from fabric_init.tools.inspect.contents import CheckpointContents, Damage, FileRow, TensorRow, Values
from fabric_init.tools.inspect.inspect import inspect
from fabric_init.tools.inspect.name_folding import Folded, fold, fold_names

__all__ = ["CheckpointContents", "Damage", "FileRow", "Folded", "TensorRow", "Values", "fold", "fold_names", "inspect"]
