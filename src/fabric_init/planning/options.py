"""The checkpoint that ``materialize``, ``Fabric.init_module`` or ``FillModel`` is given."""

from __future__ import annotations

import os

from fabric_init.errors import OptionError
from fabric_init.planning.checkpoint_source import CheckpointSource
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.recorded_load.converted import Convert


def declared_checkpoint(
    checkpoint: str | os.PathLike[str] | None,
    options: LoadOptions,
    *,
    mmap: bool,
    entry: str | None,
    manifest: str | os.PathLike[str] | None,
    convert: Convert,
) -> CheckpointSource | None:
    """Return the checkpoint to open, if there is one.

    Raises:
        OptionError: There is no checkpoint, but an option that applies only to a load.
    """
    if checkpoint is not None:
        return CheckpointSource(checkpoint, mmap, entry, manifest, convert)
    set_by_user = {
        "strict=False": not options.strict,
        "rename": options.rename is not None,
        "reinit": bool(options.reinit),
        "mmap=False": not mmap,
        "entry": entry is not None,
        "manifest": manifest is not None,
        "convert": bool(convert),
    }
    useless = [option for option, is_set in set_by_user.items() if is_set]
    if useless:
        raise OptionError(f"no checkpoint=… to load from, so these options have no effect: {', '.join(useless)}")
    return None
