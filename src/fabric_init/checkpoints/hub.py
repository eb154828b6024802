"""Models of the Hugging Face Hub: an id such as ``org/name`` or ``org/name@revision``, and folders of its cache.

A checkpoint that is complete in the cache is used without a request: a branch (``main`` by default) then means the
commit that it meant when it was fetched. Otherwise only the files of one checkpoint are fetched: the index
and its shards, or the single file, and the config; never the other formats of the same weights.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fabric_init.checkpoints.formats.gguf.reader import parts_of
from fabric_init.checkpoints.formats.indexed_files import read_weight_map
from fabric_init.errors import CheckpointError, CheckpointNotFoundError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]+))?")
_INDEX = ".index.json"
_CONFIG = "config.json"  # says how weights are quantized
_FILES = (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

Choose = Callable[[str, Sequence[str]], "str | None"]
"""From the names of the files there, the one to open."""


def is_model_id(text: str) -> bool:
    """Return whether ``text`` can only be the id of a model: ``org/name``, with ``@revision`` or without.

    Nothing local may have that name, nor may there be a folder ``org``: a path with a slip in it goes to no network.
    """
    if _ID.fullmatch(text) is None or text.endswith(_FILES):
        return False
    return not os.path.lexists(text) and not os.path.isdir(text.partition("/")[0])


def is_cache_folder(path: Path) -> bool:
    """Return whether this is a model's folder in the cache: ``models--org--name``, with ``snapshots`` in it."""
    return (path / "snapshots").is_dir() and path.name.startswith(("models--", "datasets--"))


def snapshot_in(folder: Path, revision: str = "main") -> Path:
    """Return the folder of one revision in a model's folder of the cache.

    Raises:
        CheckpointNotFoundError: it was not fetched.
    """
    reference = folder / "refs" / revision
    snapshots = folder / "snapshots"
    there = sorted(entry.name for entry in snapshots.iterdir()) if snapshots.is_dir() else []
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit not in there and revision == "main" and not reference.is_file() and len(there) == 1:
        commit = there[0]
    if commit not in there:
        raise CheckpointNotFoundError(
            f"{folder} has no snapshot of {revision!r}; there is {', '.join(there[:8]) or 'none'}."
        )
    return snapshots / commit


def fetch(asked: str, choose: Choose) -> Path:
    """Return the folder in the cache with the checkpoint of a model id; fetch it if it is not there.

    Args:
        asked: ``org/name`` or ``org/name@revision``.
        choose: which of the files there to open.

    Raises:
        CheckpointNotFoundError: there is no such model, no access to it, or it is neither in the cache nor reachable.
    """
    match = _ID.fullmatch(asked)
    assert match is not None, f"{asked} is no model id"
    name, revision = match["id"], match["revision"] or "main"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointNotFoundError(
            f"{asked} does not exist here. If it is a model of the Hugging Face Hub: pip install huggingface_hub."
        )
    cached = _cached(name, revision)
    if cached is not None and _is_complete(cached, choose):
        return cached
    return _download(asked, name, revision, choose)


def _cached(name: str, revision: str) -> Path | None:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        return snapshot_in(folder, revision)
    except (CheckpointNotFoundError, OSError, ValueError):
        return None


def _is_complete(folder: Path, choose: Choose) -> bool:
    """Return whether every file of the checkpoint is there."""
    try:
        chosen = choose(str(folder), sorted(entry.name for entry in folder.iterdir() if entry.is_file()))
        if chosen is None:
            return False
        return all((folder / part).is_file() for part in _parts_of(folder / chosen))
    except (CheckpointError, OSError, ValueError):
        return False


def _parts_of(chosen: Path) -> list[str]:
    """Return the names of the files that the one to open stands for, itself not if it is an index."""
    return sorted(set(read_weight_map(chosen).values())) if chosen.name.endswith(_INDEX) else parts_of(chosen.name)


def _download(asked: str, name: str, revision: str, choose: Choose) -> Path:
    import huggingface_hub

    try:
        there = huggingface_hub.HfApi().model_info(name, revision=revision)
        names = sorted(file.rfilename for file in there.siblings or [] if "/" not in file.rfilename)
        chosen = choose(asked, names)
        if chosen is None:
            raise CheckpointNotFoundError(f"{asked} has no checkpoint in it; found {', '.join(names[:8])}.")
        # By the revision that was asked for: that writes down in the cache which commit it is now.
        first = Path(huggingface_hub.hf_hub_download(name, chosen, revision=revision))
        beside = [file for file in names if file == _CONFIG]
        for part in (*_parts_of(first), *beside):
            if part != chosen:
                huggingface_hub.hf_hub_download(name, part, revision=first.parent.name)
        return first.parent
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointNotFoundError(_explain(asked, name, error)) from error


def _explain(asked: str, name: str, error: Exception) -> str:
    from huggingface_hub import constants

    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    return (
        f"{asked}: there is no such file or folder here, the model is not complete in the cache "
        f"{constants.HF_HUB_CACHE}, and fetching it failed: {reason} ({type(error).__name__}). Fetch it "
        f"where there is a network (hf download {name}), or give the path of a local checkpoint."
    )
