"""Open a path, URL or model id with the reader of its format."""

from __future__ import annotations

import os

from fabric_init.checkpoints.known_formats import find_format
from fabric_init.checkpoints.reader import CheckpointReader
from fabric_init.checkpoints.registry import Candidate
from fabric_init.checkpoints.storage.manifest import Manifest
from fabric_init.checkpoints.storage.remote import RemotePath
from fabric_init.errors import CheckpointError, CheckpointFormatError, is_out_of_memory


def open_checkpoint(
    path: str | os.PathLike[str] | RemotePath,
    *,
    mmap: bool = True,
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
) -> CheckpointReader:
    """Open a checkpoint; no weight is read.

    Files are recognized by their first bytes. In a folder ``model.safetensors`` is preferred, then a safetensors index
    or a single safetensors file, then the metadata of ``torch.distributed.checkpoint`` (which is what sharded
    strategies save), then a DeepSpeed checkpoint, then ``pytorch_model.bin``, a torch index or a single torch file,
    then a single GGUF file, which may be split. Formats of :func:`~fabric_init.checkpoints.register_reader` are asked
    first.

    Args:
        path: a file, the folder it lies in, its ``*.index.json``, a DeepSpeed folder, a URL for fsspec (``s3://…``), or
            the id of a model on the Hugging Face Hub, ``org/name`` or ``org/name@revision``, where nothing local has
            that name.
        mmap: what is read later is a view of a private copy-on-write map. ``False`` copies, for files that may be
            overwritten in place. What is remote, or checked block by block, is always copied.
        entry: the state dict that is meant, by its key (``"generator"``, or ``"app.model"`` for one in a dict in it),
            for a torch file or distributed checkpoint that holds several.
        manifest: SHA-256 digests to compare with: a file as ``sha256sum`` or
            :func:`~fabric_init.checkpoints.write_manifest` writes it.

    Raises:
        CheckpointNotFoundError: nothing is there, or a folder has no checkpoint in it.
        CheckpointFormatError: it cannot be read, differs from the manifest, or several unrelated files, or state dicts
            in a file, could be meant.
    """
    sums = None if manifest is None else Manifest(manifest)
    candidate = Candidate(path, mmap=mmap, manifest=sums, entry=entry)
    try:
        format, candidate = find_format(candidate)
        reader = format.open(candidate)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise CheckpointFormatError(f"{path} cannot be opened: {error}. Check the path and permissions.") from error
    if candidate.origin:
        reader.note = f"{candidate.origin}; {reader.note}" if reader.note else candidate.origin
    return reader
