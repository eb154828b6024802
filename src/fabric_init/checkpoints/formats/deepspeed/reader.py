"""Reader for the folder that DeepSpeed's ``engine.save_checkpoint`` writes, at every ZeRO stage.

``folder/latest`` names the tag; ``folder/<tag>`` holds the files. Which values are taken: for a trainable parameter of
ZeRO-1, 2 or 3 its fp32 master; for everything else (frozen parameters, buffers, all of stage 0) what the module held,
in its own dtype. For the 16-bit weights of stage 1 or 2 open ``mp_rank_00_model_states.pt`` itself. Nothing is
consolidated: a region is read from the ranks' parts it lies in, see
:mod:`~fabric_init.checkpoints.formats.deepspeed.layout`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fabric_init.checkpoints.formats.deepspeed.flat_shards import FlatShards
from fabric_init.checkpoints.formats.deepspeed.layout import locate
from fabric_init.checkpoints.formats.torch_save.archive import TorchArchives
from fabric_init.checkpoints.formats.torch_save.reader import checked_key, load_archive
from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Region
from fabric_init.checkpoints.state_dicts import CHECKPOINT_WRAPPER, EXTRA_STATE
from fabric_init.checkpoints.storage.local import MAPPED_FILES, open_bytes
from fabric_init.checkpoints.storage.read_ahead import Place
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<shard>\d+)_model_states\.pt")
_OPTIM_STATES = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<shard>\d+)_optim_states\.pt")
_ELSEWHERE = re.compile(r"layer_.*_states\.pt|.*expp?_?rank_.*|.*_expert_.*")
_TAG_BYTES = 4096

_WITH_MORE = """\
{folder} was saved with {what}; here DeepSpeed checkpoints of data parallel training are read. Convert it with \
DeepSpeed's own tools (deepspeed/checkpoint/ds_to_universal.py, or the trainer's export) and open the result."""

_NOWHERE = """\
it is of ZeRO-3, where the ranks' parts of weights are in the files *_optim_states.pt, and those of {key!r} are not"""


class _PlainValue:
    """Stand-in for a class of DeepSpeed in a pickle: it holds attributes and does nothing."""


STAND_INS: list[tuple[type, str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_PlainValue, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_PlainValue, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_PlainValue, "deepspeed.utils.tensor_fragment.fragment_address"),
]
"""The classes that DeepSpeed's own files name. None of its code runs, and it need not be installed."""


def is_deepspeed_folder(names: Iterable[str]) -> bool:
    """Return whether a folder with files of these names is a DeepSpeed checkpoint, or the folder of one tag."""
    return any(name == "latest" or _MODEL_STATES.fullmatch(name) or _OPTIM_STATES.fullmatch(name) for name in names)


class DeepSpeedFolderReader(BaseReader):
    """One checkpoint of DeepSpeed; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    ``path`` is the folder with ``latest`` in it, or the folder of one tag. Files are mapped, so opening reads their
    pickles alone. A region that lies in one rank's part is a view of its map, any other is gathered into new memory;
    with ``mmap=False`` every region is copied.

    Raises:
        CheckpointNotFoundError: the tag or a rank's file is missing.
        CheckpointFormatError: a file cannot be read or carries code, the shards do not add up, or training was tensor,
            pipeline or expert parallel.
    """

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = True) -> None:
        self.path = Path(path)
        folder = tag_folder(self.path)
        names = sorted(entry.name for entry in folder.iterdir())
        states, optimizers = _by_rank(folder, names, _MODEL_STATES), _by_rank(folder, names, _OPTIM_STATES)
        files = [*states, *optimizers]
        mmap = mmap and len(files) <= MAPPED_FILES
        archives = [load_archive(open_bytes(file, mmap=mmap), STAND_INS) for file in files]
        self._archives = TorchArchives([archive for archive, _ in archives])
        if not states:
            raise CheckpointNotFoundError(f"{folder} has no file *_model_states.pt. Is the copy complete?")
        contents = [content for _, content in archives]
        try:
            self._open(contents[: len(states)], contents[len(states) :])
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            if isinstance(error, CheckpointFormatError):
                raise
            raise CheckpointFormatError(f"{folder} is not a whole checkpoint of DeepSpeed: {error}.") from error

    def _open(self, states: list[Any], optimizers: list[Any]) -> None:
        states = [state if isinstance(state, dict) else {} for state in states]
        inner: list[dict[Any, Any]] = []
        for optimizer in optimizers:
            inside = optimizer.get("optimizer_state_dict") if isinstance(optimizer, dict) else None
            if isinstance(inside, dict):
                inner.append(inside)
        if len(inner) < len(optimizers):
            raise ValueError("a file *_optim_states.pt has no dict 'optimizer_state_dict'")
        module = states[0].get("module")
        if not isinstance(module, dict):
            raise ValueError("the file *_model_states.pt has no state dict under 'module'")
        stage, masters = locate(states, inner, self._archives) if inner else (0, {})
        parameters = {  # they go by the names of parameters, and `module` by those of a state dict
            name if name in module else name.replace(CHECKPOINT_WRAPPER, ""): master for name, master in masters.items()
        }
        self.format = f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed"
        if stage:
            self.note = f"trainable parameters are the fp32 masters that {len(inner)} ranks saved"
        elif states[0].get("param_shapes") is not None:
            self.note = "there are no fp32 masters (*_optim_states.pt); all weights are the module's own"
        extra_state: dict[str, Any] = {}
        self._tensors: dict[str, torch.Tensor | FlatShards] = {}
        for key, value in module.items():
            if key in parameters:
                self._tensors[key] = parameters.pop(key)
            elif isinstance(value, torch.Tensor):
                if len(states) > 1 and not value.numel() and key not in (states[0].get("buffer_names") or ()):
                    raise ValueError(_NOWHERE.format(key=key))
                self._tensors[checked_key(self.path, key, value, self._archives)] = value.detach()
            elif isinstance(key, str) and key.endswith(EXTRA_STATE):
                extra_state[key] = self._archives.with_values(value)
        self._tensors.update(parameters)
        self.extra_state = extra_state
        self.specs = {
            key: value.spec if isinstance(value, FlatShards) else TensorSpec(value.shape, value.dtype)
            for key, value in self._tensors.items()
        }

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it, on the CPU.

        Raises:
            KeyError: there is no such tensor.
            CheckpointFormatError: a file changed after it was opened.
        """
        self.spec(key)
        value = self._tensors[key]
        if isinstance(value, FlatShards):
            return value.read(region, self._archives.read)
        return self._archives.read(value, region)

    def places(self, key: str, region: Region | None = None) -> Iterator[Place]:
        value = self._tensors[key]
        if not isinstance(value, FlatShards):
            return self._archives.places(value, region)
        parts = value.parts() if region is None else []
        return (place for part in parts for place in self._archives.places(part))

    def files(self, key: str) -> dict[str, int]:
        """Return the names of the files that hold a tensor, and how many bytes of it each holds."""
        value = self._tensors[key]
        nbytes: Counter[str] = Counter()
        for part in value.parts() if isinstance(value, FlatShards) else [value]:
            nbytes[self._archives.home(part).file.path.name] += part.nbytes
        return dict(nbytes)


def states_in(folder: Path) -> list[Path]:
    """Return the files of one tag that hold weights."""
    names = sorted(entry.name for entry in folder.iterdir())
    return [folder / name for name in names if _MODEL_STATES.fullmatch(name) or _OPTIM_STATES.fullmatch(name)]


def tag_folder(path: Path) -> Path:
    """Return the folder of the tag that ``latest`` names; ``path`` itself where there is no such file."""
    latest = path / "latest"
    if not latest.is_file():
        return path
    with latest.open("rb") as file:
        tag = file.read(_TAG_BYTES).decode(errors="replace").strip()
    if not tag or tag in (".", "..") or re.search(r"[/\\\0]", tag):
        raise CheckpointFormatError(f"{latest} should hold the name of a folder beside it, and holds {tag!r:.100}.")
    if not (path / tag).is_dir():
        raise CheckpointNotFoundError(f"{latest} names {tag!r}, but there is no such folder in {path}.")
    return path / tag


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern[str]) -> list[Path]:
    """Return the files of one kind in the order of ranks; refuse duplicates and gaps."""
    if any(_ELSEWHERE.fullmatch(name) for name in names):
        raise CheckpointFormatError(_WITH_MORE.format(folder=folder, what="pipeline or expert parallelism"))
    by_rank: dict[int, Path] = {}
    for match in filter(None, map(pattern.fullmatch, names)):
        if int(match["shard"]):
            raise CheckpointFormatError(_WITH_MORE.format(folder=folder, what="tensor parallelism"))
        rank = int(match["rank"] or 0)
        if rank in by_rank:
            raise CheckpointFormatError(
                f"{folder} has two files for rank {rank}, {by_rank[rank].name} and {match[0]}: it was saved over "
                f"another checkpoint. Remove the files of the older one."
            )
        by_rank[rank] = folder / match[0]
    if any(rank not in by_rank for rank in range(len(by_rank))):
        missing = min(set(range(max(by_rank))) - by_rank.keys())
        raise CheckpointNotFoundError(f"{folder} lacks the file of rank {missing} beside {by_rank[max(by_rank)].name}.")
    return [by_rank[rank] for rank in range(len(by_rank))]
