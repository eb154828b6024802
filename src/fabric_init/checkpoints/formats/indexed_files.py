"""Reader for a checkpoint in several files under one index, the layout of the Hugging Face Hub.

The format: ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, with a ``weight_map`` of key -> file
name, see https://huggingface.co/docs/transformers/big_models#sharded-checkpoints.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.formats.torch_save.reader import TorchFileReader
from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, places
from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.storage.http import outside
from fabric_init.checkpoints.storage.local import Opener, open_bytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.checkpoints.storage.remote import AnyPath, as_path
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

# The limit that safetensors sets its own header; the index of DeepSeek-V3, with 90,000 keys, takes 9 MB.
_INDEX_BYTES = 100_000_000


class ShardedReader(BaseReader):
    """The shards that one index file names; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    Opening reads every shard's header (no weight) and checks that each indexed key is where the index says. ``path`` is
    the folder or index that was asked for. ``mmap`` as in the readers of the single files.

    Raises:
        CheckpointNotFoundError: the index or a shard is missing.
        CheckpointFormatError: the index is damaged, names a file outside its folder or a key that its shard lacks, or a
            shard cannot be read.
    """

    def __init__(
        self,
        index: str | os.PathLike[str] | AnyPath,
        *,
        path: str | os.PathLike[str] | AnyPath | None = None,
        mmap: bool = True,
        opener: Opener | None = None,
    ) -> None:
        index = as_path(index)
        self.path = index if path is None else as_path(path)
        weight_map = read_weight_map(index, opener)
        counts = Counter(weight_map.values())
        for name, count in counts.items():
            if isinstance(index, Path):
                check_shard(index, name, count)
            else:
                _refuse_outside(index, name)
                if outside(name):
                    raise CheckpointFormatError(
                        f"{index} names the shard {name!r}, which is refused as unsafe in a URL."
                    )
                if not (index.parent / name).is_file():
                    raise _missing(index, name, count)
        self._shards = {name: _open_shard(index.parent / name, mmap, opener) for name in counts}
        known = {name: frozenset(shard.keys()) for name, shard in self._shards.items()}
        self._where: dict[str, CheckpointReader] = {}
        for key, name in weight_map.items():
            if key not in known[name]:
                raise CheckpointFormatError(
                    f"{index} says that {key!r} is in {name}, which does not hold it. Index and shards are not of the "
                    f"same checkpoint: fetch or save them together."
                )
            self._where[key] = self._shards[name]
        self.specs = {key: shard.spec(key) for key, shard in self._where.items()}
        self.extra_state = {key: state for shard in self._shards.values() for key, state in shard.extra_state.items()}
        self.fields = {name: said for shard in self._shards.values() for name, said in shard.fields.items()}
        kinds = sorted({shard.format for shard in self._shards.values()})
        self.format = f"sharded {' and '.join(kinds)}"
        self.note = self._notes(sum(map(len, known.values())) - len(weight_map))

    @property
    def shard_paths(self) -> list[AnyPath]:
        """The files that the index names."""
        return [shard.path for shard in self._shards.values()]

    def _notes(self, unlisted: int) -> str | None:
        notes = [f"{name}: {shard.note}" for name, shard in self._shards.items() if shard.note]
        if unlisted > 0:
            notes.append(f"tensors in the shards that the index does not list, ignored: {unlisted}")
        return "; ".join(notes) or None

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, from its shard. Raises ``KeyError`` for an unknown key."""
        self.spec(key)
        return self._where[key].read(key, region)

    def places(self, key: str, region: Region | None = None) -> Iterable[Place]:
        return places(self._where[key], key, region)


def _open_shard(path: AnyPath, mmap: bool, opener: Opener | None) -> SafetensorsReader | TorchFileReader:
    kind = SafetensorsReader if path.suffix == ".safetensors" else TorchFileReader
    return kind(path, mmap=mmap, opener=opener)


def read_weight_map(index: AnyPath, opener: Opener | None = None) -> dict[str, str]:
    """Return the ``weight_map`` of an index: checkpoint key -> name of the shard that holds it."""
    file = open_bytes(index, mmap=False) if opener is None else opener(index)
    if file.size > _INDEX_BYTES:
        raise CheckpointFormatError(f"{index} has {file.size:,} bytes; an index has at most {_INDEX_BYTES:,}.")

    def refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} is given twice")
        return content

    text = file.head(file.size)
    try:
        content = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{index} is not a readable index: {error}. Fetch or save it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(
            f'{index} has no "weight_map" of key -> file name, so it is no index of a sharded checkpoint.'
        )
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointFormatError(f"{index}: the file of {key!r} should be a name, and is {name!r:.80}.")
    return weight_map


def check_shard(index: Path, name: str, count: int) -> os.stat_result:
    """Refuse a file name in ``index`` (of ``count`` keys) that leaves its folder, or that no file there has.

    Returns:
        The result of ``os.stat``.
    """
    _refuse_outside(index, name)
    try:
        status = os.stat(index.parent / name)
    except PermissionError as error:
        raise CheckpointFormatError(f"{index}: shard {name!r} cannot be reached: {error}.") from error
    except (OSError, ValueError):  # ValueError: a null byte
        raise _missing(index, name, count) from None
    if not stat.S_ISREG(status.st_mode):
        raise _missing(index, name, count)
    return status


def _refuse_outside(index: AnyPath, name: str) -> None:
    # By the letters of the name, not by resolving it: the Hub's cache keeps shards as symbolic links out of the folder.
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if not name or ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise CheckpointFormatError(f"{index} names the shard {name!r}, outside its folder; that is refused as unsafe.")


def _missing(index: AnyPath, name: str, count: int) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{index} names the shard {name!r}, which holds {count} of its keys, but there is no such file in "
        f"{index.parent}. Is the download complete?"
    )
