"""A look at a folder of ``torch.distributed.checkpoint``: what its metadata says, against the files that are there."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import torch

from fabric_init._text import counted, dtype_name
from fabric_init.checkpoints.formats.dcp.contents import Chunk, Contents, TensorEntry
from fabric_init.checkpoints.formats.dcp.metadata import read_metadata
from fabric_init.checkpoints.formats.indexed_files import check_shard
from fabric_init.checkpoints.formats.safetensors import SafetensorsReader
from fabric_init.checkpoints.formats.torch_save.archive import SavedTensor, find_saved_tensor
from fabric_init.checkpoints.region import Span
from fabric_init.checkpoints.state_dicts import Location, choose_state_dict, describe
from fabric_init.checkpoints.storage.local import FileBytes, open_bytes
from fabric_init.errors import CheckpointError, CheckpointFormatError
from fabric_init.tools.inspect.contents import Damage
from fabric_init.tools.inspect.survey import ElementRun, Survey, SurveyedTensor

_METADATA = ".metadata"


def survey_dcp(folder: Path, entry: str | None) -> Survey:
    """Return what ``.metadata`` lists, compared with the files of the folder.

    Raises :class:`~fabric_init.errors.CheckpointError` when it cannot be read.
    """
    contents = read_metadata(folder / _METADATA)
    survey = Survey("torch.distributed.checkpoint", files={_METADATA: (folder / _METADATA).stat().st_size})
    taken = _choose(survey, folder, contents, entry)
    _stat(survey, folder, contents)
    _compare(survey, contents, taken)
    for shown, full, tensor in taken:
        files: Counter[str] = Counter()
        for chunk in tensor.chunks:
            files[chunk.item.file] += chunk.box.numel * tensor.spec.dtype.itemsize
        nbytes = tensor.spec.shape.numel() * tensor.spec.dtype.itemsize
        one = SurveyedTensor(shown, tuple(tensor.spec.shape), dtype_name(tensor.spec.dtype), nbytes, dict(files))
        one.whole = all(_is_there(survey, chunk) for chunk in tensor.chunks)
        one.layout = [chunk.box for chunk in tensor.chunks] if len(tensor.chunks) > 1 else None
        if one.whole:
            one.runs = tuple(
                ElementRun(chunk.box.numel, _SurveyedChunk(folder, full, tensor, chunk).read) for chunk in tensor.chunks
            )
        survey.found.append(one)
    return survey


Taken = list[tuple[str, str, TensorEntry]]
"""Name to show, key of the metadata, and what it says."""


def _choose(survey: Survey, folder: Path, contents: Contents, entry: str | None) -> Taken:
    """Return the tensors of the chosen state dict; of all, where several could be meant."""
    counts = contents.state_dicts()
    survey.entries = {".".join(location): number for location, number in counts.items()}
    wanted: set[Location]
    try:
        wanted = {choose_state_dict(folder, counts, entry)}
    except CheckpointFormatError:
        if entry is not None or len(counts) < 2:
            raise
        survey.notes.append(f"{len(counts)} state dicts, of which a load takes the one that entry= names")
        survey.readable = False
        wanted = set(counts)
    taken = [(key, tensor) for key, tensor in contents.tensors.items() if tensor.location in wanted]
    if len(wanted) == 1:
        survey.notes += [note for note in [describe(*wanted)] if note]
        shown = [(tensor.name, key, tensor) for key, tensor in taken]
    else:
        shown = [(".".join((*tensor.location, tensor.name)), key, tensor) for key, tensor in taken]
    if others := len(contents.tensors) - len(taken):
        survey.notes.append(f"other tensors, left out: {others}")
    return shown


def _stat(survey: Survey, folder: Path, contents: Contents) -> None:
    for name in sorted(contents.ends):
        try:
            survey.files[name] = check_shard(folder / _METADATA, name, 1).st_size
        except CheckpointError:
            survey.files[name] = None
    unnamed = sorted(path.name for path in folder.glob("*.distcp") if path.name not in survey.files)
    if unnamed:
        survey.notes.append(f"files that the metadata does not name, ignored: {', '.join(unnamed[:5])}")


def _is_there(survey: Survey, chunk: Chunk) -> bool:
    size = survey.files[chunk.item.file]
    return size is not None and chunk.item.offset + chunk.item.length <= size


def _compare(survey: Survey, contents: Contents, taken: Taken) -> None:
    """Each file must be there, and end where the last thing in it ends."""
    shown = {key: name for name, key, _ in taken}
    cut: defaultdict[str, dict[str, None]] = defaultdict(dict)
    extents: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for key, tensor in contents.tensors.items():
        for chunk in tensor.chunks:
            item = chunk.item
            extents[item.file].append((item.offset, item.offset + item.length, key))
            if not _is_there(survey, chunk):
                cut[item.file][shown.get(key, key)] = None
    for name, stop in contents.ends.items():
        size = survey.files[name]
        keys = tuple(cut[name])
        if size is None:
            message = f"not there; it should hold parts of {counted(len(keys), 'tensor')}"
            survey.damage.append(Damage("missing file", message, name, keys))
        elif size < stop:
            message = f"ends at byte {size:,}, {stop - size:,} too early: {counted(len(keys), 'tensor')} not whole"
            survey.damage.append(Damage("truncated", message, name, keys))
        elif size > stop:
            message = f"{size - stop:,} bytes after the last of what the metadata names, from {stop:,} on"
            survey.damage.append(Damage("trailing bytes", message, name))
        end, before = 0, ""
        for first, last, key in sorted(extents[name]):
            if first < end:
                both = shown.get(before, before), shown.get(key, key)
                survey.damage.append(Damage("overlap", f"both have bytes {first:,} to {min(end, last):,}", name, both))
            if last > end:
                end, before = last, key


class _SurveyedChunk:
    """One chunk, found in its file when it is first read."""

    def __init__(self, folder: Path, key: str, tensor: TensorEntry, chunk: Chunk) -> None:
        self._folder, self._key, self._tensor, self._chunk = folder, key, tensor, chunk
        self._source: SavedTensor | SafetensorsReader | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        source = self._source = self._source or self._open()
        if isinstance(source, SafetensorsReader):
            return source.read(self._key, Span(start, stop))
        return source.read(Span(start, stop))

    def _open(self) -> SavedTensor | SafetensorsReader:
        item = self._chunk.item
        file: FileBytes = open_bytes(self._folder / item.file, mmap=False)
        if file.head(9)[8:] == b"{":
            return SafetensorsReader(self._folder / item.file, mmap=False)
        dtype = self._tensor.spec.dtype
        return find_saved_tensor(file, item.offset, item.length, dtype, self._chunk.box.sizes)
