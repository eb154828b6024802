"""The options of a load, as ``materialize`` and ``Fabric.init_module`` take them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.errors import OptionError
from fabric_init.planning.checkpoint_source import CheckpointSource
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.recorded_load.converted import Convert


def load_options(
    checkpoint: str | os.PathLike[str] | None,
    *,
    strict: bool,
    rename: Rename,
    reinit: Sequence[str],
    mmap: bool,
    entry: str | None,
    manifest: str | os.PathLike[str] | None,
    convert: Convert,
) -> tuple[CheckpointSource | None, LoadOptions]:
    """Return the checkpoint to open, if there is one, and how to load it.

    Raises:
        OptionError: There is no checkpoint, but an option that applies only to a load.
    """
    options = LoadOptions(strict, rename, reinit)
    if checkpoint is not None:
        return CheckpointSource(checkpoint, mmap, entry, manifest, convert), options
    set_by_user = {
        "strict=False": not strict,
        "rename": rename is not None,
        "reinit": bool(reinit),
        "mmap=False": not mmap,
        "entry": entry is not None,
        "manifest": manifest is not None,
        "convert": bool(convert),
    }
    useless = [option for option, is_set in set_by_user.items() if is_set]
    if useless:
        raise OptionError(f"no checkpoint=… to load from, so these options have no effect: {', '.join(useless)}")
    return None, options
