"""What a checkpoint holds, and what is wrong with it: from its header, and, where asked for, from its values.

:func:`inspect` goes as far as it can. Where a reader of :mod:`fabric_init.checkpoints` refuses a damaged file with one
error, this tells what in it is sound and what is not.
"""

from __future__ import annotations

from fabric_init.tools.inspect.contents import Contents, Damage, FileRow, TensorRow, Values
from fabric_init.tools.inspect.inspect import inspect
from fabric_init.tools.inspect.name_folding import Folded, fold, fold_names

__all__ = ["Contents", "Damage", "FileRow", "Folded", "TensorRow", "Values", "fold", "fold_names", "inspect"]
