"""A path -> the reader for what lies there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from fabric_init.checkpoints.dcp import DCPReader
from fabric_init.checkpoints.file_bytes import open_bytes
from fabric_init.checkpoints.reader import CheckpointReader
from fabric_init.checkpoints.safetensors import SafetensorsReader
from fabric_init.checkpoints.sharded import ShardedReader
from fabric_init.checkpoints.torch_file import TorchFileReader
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What a training run saves beside the weights: files of torch.save, yet no model.
_NOT_WEIGHTS = frozenset(
    f"{name}{suffix}"
    for name in ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
    for suffix in _TORCH_SUFFIXES
)

_LOOKED_FOR = """\
*.safetensors.index.json, model.safetensors or a single *.safetensors, .metadata of torch.distributed.checkpoint, \
*.bin.index.json, pytorch_model.bin or a single *.bin, *.pt, *.pth or *.ckpt"""

_KNOWN_ELSEWHERE = {
    b"GGUF": "a GGUF file (llama.cpp)",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUM": "a NumPy array",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run `git lfs pull`",
    b"<": "an HTML or XML page: the download answered with an error page",
}


def open_checkpoint(path: str | os.PathLike[str], *, mmap: bool = True, entry: str | None = None) -> CheckpointReader:
    """Open a checkpoint file, the folder it lies in, or its ``*.index.json``; no weight is read.

    Files are told apart by their first bytes. In a folder a safetensors index is preferred, then a single safetensors
    file, then the metadata of ``torch.distributed.checkpoint`` (which is what sharded strategies save), then a torch
    index, then a single torch file.

    Args:
        path: file, folder or index.
        mmap: what is read later is a view of a private copy-on-write map. ``False`` copies, for files that may be
            overwritten in place.
        entry: the state dict that is meant, by its key (``"generator"``, or ``"app.model"`` for one in a dict in it),
            for a torch file or distributed checkpoint that holds several.

    Raises :class:`~fabric_init.errors.CheckpointNotFoundError` when there is nothing at ``path``, or a folder has no
    checkpoint in it, and :class:`~fabric_init.errors.CheckpointFormatError` when what is there cannot be read, or
    several unrelated files, or state dicts in it, could be meant.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_file(_choose(path), asked=path, mmap=mmap, entry=entry)
        if not path.exists():
            raise CheckpointNotFoundError(f"{path} does not exist.{_nearby(path)}")
    except (OSError, ValueError) as error:
        if isinstance(error, (CheckpointFormatError, CheckpointNotFoundError)):
            raise
        raise CheckpointFormatError(f"{path} cannot be opened: {error}. Check the path and permissions.") from error
    return _open_file(path, asked=path, mmap=mmap, entry=entry)


def _open_file(path: Path, *, asked: Path, mmap: bool, entry: str | None) -> CheckpointReader:
    if path.name == ".metadata":
        return DCPReader(path.parent, mmap=mmap, entry=entry)
    head = open_bytes(path, mmap=False).head(64)
    if path.suffix == ".distcp":
        raise CheckpointFormatError(
            f"{path} is one rank's part of a torch.distributed.checkpoint: give the folder, {path.parent}."
        )
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[5:9] != b"\0\0\0{" and path.suffix != ".safetensors":
        return TorchFileReader(path, mmap=mmap, entry=entry)
    if entry is not None:
        raise CheckpointFormatError(f"{path} has no entries, so entry={entry!r} names nothing in it. Leave it out.")
    if path.name.endswith(".index.json"):
        return ShardedReader(path, path=asked, mmap=mmap)
    # A header length leaves its upper bytes zero, then comes the JSON object.
    if head[5:9] == b"\0\0\0{" or path.suffix == ".safetensors":
        for magic, what in _KNOWN_ELSEWHERE.items():
            if head.startswith(magic) and head[5:9] != b"\0\0\0{":
                raise CheckpointFormatError(f"{path} is {what}.")
        return SafetensorsReader(path, mmap=mmap)
    for magic, what in _KNOWN_ELSEWHERE.items():
        if head.startswith(magic):
            raise CheckpointFormatError(f"{path} is {what}.")
    raise CheckpointFormatError(
        f"{path} is in no format that is known here (safetensors, torch.save, a *.index.json): it begins with "
        f"{head[:8]!r}."
    )


def _choose(folder: Path) -> Path:
    """The one file of ``folder`` to open."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(".index.json")]
    chosen = _prefer(folder, [n for n in indices if ".safetensors." in n], "model.safetensors.index.json")
    chosen = chosen or _prefer(folder, weights, "model.safetensors")
    if chosen is None and ".metadata" in names:
        # Before looking for torch files: Lightning puts a meta.pt beside it, with everything but the weights.
        return folder / ".metadata"
    chosen = chosen or _prefer(folder, [n for n in indices if ".safetensors." not in n], "pytorch_model.bin.index.json")
    torch_files = [name for name in names if name.endswith(_TORCH_SUFFIXES) and name not in _NOT_WEIGHTS]
    chosen = chosen or _prefer(folder, torch_files, "pytorch_model.bin")
    if chosen is None:
        there = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        raise CheckpointNotFoundError(
            f"{folder} has no checkpoint in it. Looked for {_LOOKED_FOR}; found {_listed(there) or 'an empty folder'}."
        )
    return folder / chosen


def _prefer(folder: Path, names: list[str], usual: str) -> str | None:
    """The usual name if it is there, else the only one."""
    if usual in names or len(names) < 2:
        return usual if usual in names else next(iter(names), None)
    raise CheckpointFormatError(
        f"{folder} has {len(names)} files that could be meant: {_listed(names)}. Give the path of one; if they are "
        f"shards of one checkpoint, its index is missing."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _nearby(path: Path) -> str:
    """A sentence on what lies where ``path`` should be."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    # A folder of millions of files is not worth reading for a hint.
    names: Iterable[str] = (entry.name for entry in islice(path.parent.iterdir(), 10_000))
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" In {path.parent} there is {', '.join(close)}." if close else ""
