"""The formats that are read, in the order in which they are tried, and how each is recognized and opened."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from fabric_init._text import joined
from fabric_init.checkpoints.formats.dcp.reader import DCPReader
from fabric_init.checkpoints.formats.deepspeed.reader import DeepSpeedFolderReader, is_deepspeed_folder
from fabric_init.checkpoints.formats.gguf.header import MAGIC
from fabric_init.checkpoints.formats.gguf.reader import GGUFReader, chosen_of
from fabric_init.checkpoints.formats.indexed_files import ShardedReader
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.formats.torch_save.reader import TorchFileReader
from fabric_init.checkpoints.hub import fetch, is_cache_folder, is_model_id, snapshot_in
from fabric_init.checkpoints.reader import CheckpointReader
from fabric_init.checkpoints.registry import Candidate, Format, Way, registered_formats
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What a training run saves beside the weights: files of torch.save, yet no model. Lightning's is meta.pt.
_NOT_WEIGHTS = frozenset(
    f"{name}{suffix}"
    for name in ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "meta")
    for suffix in _TORCH_SUFFIXES
)

_LOOKED_FOR = """\
model.safetensors, *.safetensors.index.json or a single *.safetensors, .metadata of torch.distributed.checkpoint, \
latest of DeepSpeed, pytorch_model.bin, *.bin.index.json or a single *.bin, *.pt, *.pth or *.ckpt, a single *.gguf"""

_KNOWN_ELSEWHERE = {
    b"\x89HDF": "an HDF5 file (Keras)",
    b"\x93NUM": "a NumPy array",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the weights: run `git lfs pull`",
    b"<": "an HTML or XML page: the download answered with an error page",
}


def find_format(candidate: Candidate) -> tuple[Format, Candidate]:
    """Return the format of a checkpoint, and what to open: the file in a folder, the cached folder of a model id.

    Raises:
        CheckpointError: as :func:`~fabric_init.checkpoints.open_checkpoint` does.
        OSError, ValueError: the path cannot be looked at.
    """
    formats: Sequence[Format | Way] = (*registered_formats(), *_KNOWN)
    while True:
        format = next(format for format in formats if format.recognizes(candidate))
        if isinstance(format, Format):
            return format, candidate
        candidate, formats = format.follow(candidate), _KNOWN


def _fetched(candidate: Candidate) -> Candidate:
    folder = fetch(candidate.asked, _chosen)
    return candidate.at(folder, f"{candidate.asked} at commit {folder.name}")


def _refuse_missing(candidate: Candidate) -> CheckpointReader:
    near = _nearby(candidate.path) if isinstance(candidate.path, Path) else ""
    raise CheckpointNotFoundError(f"{candidate.path} does not exist.{near}")


def _cached(candidate: Candidate) -> Candidate:
    return candidate.at(snapshot_in(Path(candidate.asked)))


def _inside(candidate: Candidate) -> Candidate:
    chosen = _chosen(str(candidate.path), candidate.names)
    assert chosen is not None
    return candidate.at(candidate.path / chosen)


def _open_distributed(candidate: Candidate) -> CheckpointReader:
    folder = candidate if candidate.is_dir else candidate.at(candidate.path.parent)
    return DCPReader(_local(folder, "a torch.distributed.checkpoint"), mmap=folder.mmap, entry=folder.entry)


def _refuse_part(candidate: Candidate) -> CheckpointReader:
    raise CheckpointFormatError(
        f"{candidate.path} is one rank's part of a torch.distributed.checkpoint: give the folder, "
        f"{candidate.path.parent}."
    )


def _open_deepspeed(candidate: Candidate) -> CheckpointReader:
    candidate.refuse_entry()
    return DeepSpeedFolderReader(_local(candidate, "a DeepSpeed checkpoint"), mmap=candidate.mmap)


def _local(candidate: Candidate, what: str) -> Path:
    """Return the path, checked against the manifest, for readers that open files by themselves."""
    if not isinstance(candidate.path, Path):
        raise CheckpointFormatError(f"{candidate.path} is {what}, which is read from a local folder: download it.")
    candidate.check_files()
    return candidate.path


def _refuse_folder(candidate: Candidate) -> CheckpointReader:
    path, there = candidate.path, list(candidate.names)
    if isinstance(path, Path):
        there = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    raise CheckpointNotFoundError(
        f"{path} has no checkpoint in it. Looked for {_LOOKED_FOR}; found {joined(there) or 'an empty folder'}."
    )


def _open_index(candidate: Candidate) -> CheckpointReader:
    candidate.refuse_entry()
    return ShardedReader(candidate.path, mmap=candidate.mmap, opener=candidate.opener)


def _is_safetensors(candidate: Candidate) -> bool:
    # A header length leaves its upper bytes zero, then comes the JSON object.
    if candidate.head[5:9] == b"\0\0\0{":
        return True
    return candidate.path.suffix == ".safetensors" and _elsewhere(candidate.head) is None


def _open_safetensors(candidate: Candidate) -> CheckpointReader:
    candidate.refuse_entry()
    return SafetensorsReader(candidate.path, mmap=candidate.mmap, opener=candidate.opener)


def _open_torch(candidate: Candidate) -> CheckpointReader:
    return TorchFileReader(candidate.path, mmap=candidate.mmap, entry=candidate.entry, opener=candidate.opener)


def _open_gguf(candidate: Candidate) -> CheckpointReader:
    candidate.refuse_entry()
    return GGUFReader(candidate.path, mmap=candidate.mmap, opener=candidate.opener)


def _refuse_unknown(candidate: Candidate) -> CheckpointReader:
    what = _elsewhere(candidate.head)
    if what is not None:
        raise CheckpointFormatError(f"{candidate.path} is {what}.")
    raise CheckpointFormatError(
        f"{candidate.path} is in no format that is known here (safetensors, torch.save, GGUF, a *.index.json): it "
        f"begins with {candidate.head[:8]!r}."
    )


# The formats that are read. tools.inspect looks at each in its own way, and names them by these constants.
DCP = Format("torch.distributed.checkpoint", lambda it: ".metadata" in (it.path.name, *it.names), _open_distributed)
DEEPSPEED = Format("DeepSpeed", lambda it: is_deepspeed_folder(it.names), _open_deepspeed)
INDEX = Format("index", lambda it: it.path.name.endswith(".index.json"), _open_index)
SAFETENSORS = Format("safetensors", _is_safetensors, _open_safetensors)
GGUF = Format("GGUF", lambda it: it.head.startswith(MAGIC), _open_gguf)
TORCH = Format("torch", lambda it: it.head.startswith((b"PK\x03\x04", b"\x80")), _open_torch)

# In the order of preference. The last entry recognizes everything, and refuses it.
_KNOWN: Sequence[Format | Way] = (
    Way("model id", lambda it: not it.is_url and is_model_id(it.asked), _fetched),
    Format("nothing", lambda it: not it.path.exists(), _refuse_missing),
    Way("Hugging Face cache", lambda it: isinstance(it.path, Path) and is_cache_folder(it.path), _cached),
    Way("folder of safetensors", lambda it: _safetensors_in(it.asked, it.names) is not None, _inside),
    # Before looking for torch files: Lightning puts a meta.pt beside it, with everything but the weights.
    DCP,
    Format("part of that", lambda it: it.path.suffix == ".distcp", _refuse_part),
    DEEPSPEED,
    Way("folder of torch files", lambda it: _torch_in(it.asked, it.names) is not None, _inside),
    Way("folder of GGUF", lambda it: _gguf_in(it.asked, it.names) is not None, _inside),
    Format("other folder", lambda it: it.is_dir, _refuse_folder),
    INDEX,
    GGUF,
    SAFETENSORS,
    TORCH,
    Format("unknown", lambda it: True, _refuse_unknown),
)


def _chosen(folder: str, names: Sequence[str]) -> str | None:
    """Return the file of ``folder`` to open."""
    return _safetensors_in(folder, names) or _torch_in(folder, names) or _gguf_in(folder, names)


def _safetensors_in(folder: str, names: Sequence[str]) -> str | None:
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    return _usual_or_index(folder, weights, indices, "model.safetensors")


def _torch_in(folder: str, names: Sequence[str]) -> str | None:
    weights = [name for name in names if name.endswith(_TORCH_SUFFIXES) and name not in _NOT_WEIGHTS]
    indices = [name for name in names if name.endswith(".index.json") and ".safetensors." not in name]
    return _usual_or_index(folder, weights, indices, "pytorch_model.bin")


def _usual_or_index(folder: str, weights: Sequence[str], indices: Sequence[str], usual: str) -> str | None:
    """Return the ``usual`` file if it is there, as ``from_pretrained`` does beside a stale index; else an index."""
    if usual in weights:
        return usual
    return _prefer(folder, indices, f"{usual}.index.json") or _prefer(folder, weights, usual)


def _gguf_in(folder: str, names: Sequence[str]) -> str | None:
    return _prefer(folder, chosen_of(names), "model.gguf")


def _prefer(folder: str, names: Sequence[str], usual: str) -> str | None:
    """Return ``usual`` if it is among ``names``, else the only name."""
    if usual in names or len(names) < 2:
        return usual if usual in names else next(iter(names), None)
    raise CheckpointFormatError(
        f"{folder} has {len(names)} files that could be meant: {joined(names)}. Give the path of one; if they are "
        f"shards of one checkpoint, its index is missing."
    )


def _elsewhere(head: bytes) -> str | None:
    """Describe a file that begins like this, if it is of a known format that is not read here."""
    return next((what for magic, what in _KNOWN_ELSEWHERE.items() if head.startswith(magic)), None)


def _nearby(path: Path) -> str:
    """Return a sentence on similar names beside ``path``."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    # A folder of millions of files is not worth reading for a hint.
    names: Iterable[str] = (entry.name for entry in islice(path.parent.iterdir(), 10_000))
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" In {path.parent} there is {', '.join(close)}." if close else ""
