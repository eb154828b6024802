"""From a path to its contents: the look at the headers, then, where asked for, digests and values."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fabric_init._text import counted
from fabric_init.checkpoints.formats.torch_save.reader import TorchFileReader
from fabric_init.checkpoints.open import find_format
from fabric_init.checkpoints.registry import Candidate, Format, registered_formats
from fabric_init.checkpoints.storage.checksums import Manifest
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.checkpoints.storage.remote import AnyPath, RemotePath
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from fabric_init.tools.inspect.contents import Contents, Damage, FileRow, TensorRow, Values
from fabric_init.tools.inspect.survey import Found, Survey
from fabric_init.tools.inspect.surveys.dcp import survey_dcp
from fabric_init.tools.inspect.surveys.readers import survey_deepspeed, survey_reader
from fabric_init.tools.inspect.surveys.safetensors import survey_safetensors
from fabric_init.tools.inspect.surveys.sharded import survey_index, survey_unindexed, unindexed_shards
from fabric_init.tools.inspect.surveys.torch_save import survey_torch
from fabric_init.tools.inspect.values import count_values

Progress = Callable[[str, int, int], None]
"""Is told what is being done, and how many bytes of how many are done; from several threads, one at a time."""


def inspect(
    path: str | os.PathLike[str] | RemotePath,
    *,
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    match: Sequence[str] = (),
    values: bool = False,
    progress: Progress | None = None,
) -> Contents:
    """What a checkpoint holds, and what is wrong with it. Without ``values`` or ``manifest`` no weight is read.

    Args:
        path: anything that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
        entry: the state dict that is meant, where there are several. Without it all of them are told of.
        manifest: SHA-256 digests to compare every file with.
        match: globs for the tensors to tell of; none means all. Files and damage are told of in any case.
        values: read every element, too; in bounded memory.
        progress: is told how far the reading is.

    Raises:
        CheckpointNotFoundError: nothing is there.
        CheckpointFormatError: nothing can be told of it: of no known format, no header, code in its pickle.
    """
    sums = None if manifest is None else Manifest(manifest)
    candidate = Candidate(path, mmap=False, entry=entry)
    try:
        survey, root = _survey(candidate)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointFormatError(f"{path} cannot be opened: {error}. Check the path and permissions.") from error
    found = [one for one in survey.found if not match or any(fnmatchcase(one.key, glob) for glob in match)]
    shown = {one.key for one in found}
    damage = list(survey.damage)
    if sums is not None:
        damage += _compare_digests(sums, survey, root, progress)
    by_key: dict[str, Values] = {}
    if values:
        by_key = _values(found, damage, progress)
    ties = tuple(tie for tie in survey.ties if shown.intersection(tie))
    return Contents(
        path=candidate.asked,
        format=survey.format,
        note="; ".join(survey.notes) or None,
        tensors=tuple(_row(one, by_key.get(one.key)) for one in found),
        files=_files(survey),
        entries=survey.entries,
        ties=ties,
        duplicates=_duplicates(by_key, ties),
        damage=tuple(damage),
    )


def _survey(asked: Candidate) -> tuple[Survey, AnyPath]:
    """The look at the headers, and the folder that the files are in."""
    try:
        found, candidate = find_format(asked)
    except CheckpointFormatError:
        names = unindexed_shards(asked.names)
        if not names or not isinstance(asked.path, Path):
            raise
        return survey_unindexed(asked.path, names, _look), asked.path
    known = None if found in registered_formats() else _LOOKS.get(found.name)
    survey = survey_reader(found.open(candidate)) if known is None else known(found, candidate)
    if survey.readable and not survey.damage:
        try:
            found.open(candidate)
        except CheckpointError as error:  # what is sound to the look but not to the reader is not sound
            survey.damage.append(Damage("unreadable", str(error)))
    survey.notes[:0] = [candidate.origin] if candidate.origin else []
    return survey, candidate.path if candidate.is_dir else candidate.path.parent


def _look_at_safetensors(_: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    return survey_safetensors(open_bytes(candidate.path, mmap=False))


def _look_at_index(_: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    return survey_index(candidate.path, _look)


def _look_at_torch(found: Format, candidate: Candidate) -> Survey:
    try:
        return survey_torch(open_bytes(candidate.path, mmap=False), candidate.entry)
    except Exception as error:  # a corrupt pickle calls allowed functions with wrong arguments: of any type
        reader = found.open(candidate)  # its errors say best what is wrong
        if isinstance(error, CheckpointError):
            raise
        return survey_reader(reader)


def _look_at_dcp(found: Format, candidate: Candidate) -> Survey:
    whole = candidate if candidate.is_dir else candidate.at(candidate.path.parent)
    if not isinstance(whole.path, Path):
        return survey_reader(found.open(whole))
    return survey_dcp(whole.path, whole.entry)


def _look_at_deepspeed(found: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    if not isinstance(candidate.path, Path):
        return survey_reader(found.open(candidate))
    return survey_deepspeed(candidate.path)


_LOOKS: dict[str, Callable[[Format, Candidate], Survey]] = {
    "index": _look_at_index,
    "safetensors": _look_at_safetensors,
    "torch": _look_at_torch,
    "torch.distributed.checkpoint": _look_at_dcp,
    "DeepSpeed": _look_at_deepspeed,
}


def _look(path: AnyPath) -> Survey:
    """One shard, by its name as the reader does."""
    if path.suffix == ".safetensors":
        return survey_safetensors(open_bytes(path, mmap=False))
    try:
        return survey_torch(open_bytes(path, mmap=False), None)
    except Exception as error:
        if isinstance(error, CheckpointNotFoundError):
            raise
        return survey_reader(TorchFileReader(path, mmap=False))


def _row(one: Found, values: Values | None) -> TensorRow:
    offset = one.extent[0] if one.extent is not None else None
    return TensorRow(one.key, one.shape, one.dtype, one.nbytes, tuple(one.files), offset, one.whole, values)


def _files(survey: Survey) -> tuple[FileRow, ...]:
    tensors: defaultdict[str, int] = defaultdict(int)
    nbytes: defaultdict[str, int] = defaultdict(int)
    again = {key for tie in survey.ties for key in tie[1:]}
    for one in survey.found:
        for name, part in one.files.items():
            tensors[name] += 1
            nbytes[name] += 0 if one.key in again else part
    return tuple(FileRow(name, size, tensors[name], nbytes[name]) for name, size in survey.files.items())


def _compare_digests(sums: Manifest, survey: Survey, root: AnyPath, progress: Progress | None) -> list[Damage]:
    """Every byte of every file, against the manifest."""
    there = {name: size for name, size in survey.files.items() if size is not None}
    report = _Report("digests", sum(there.values()), progress)
    damage = []
    for name in there:
        try:
            ranges = sums.differing(root / name, report)
        except CheckpointError as error:
            damage.append(Damage("digest", str(error), name))
            continue
        for start, stop in ranges:
            hit = tuple(
                one.key
                for one in survey.found
                if name in one.files and one.extent is not None and one.extent[0] < stop and start < one.extent[1]
            )
            message = f"bytes {start:,} to {stop:,} have not the SHA-256 that {sums.path} lists"
            damage.append(Damage("digest", message, name, hit))
    return damage


def _values(found: Sequence[Found], damage: list[Damage], progress: Progress | None) -> dict[str, Values]:
    readable = [one for one in found if one.runs and one.whole]
    report = _Report("values", sum(one.nbytes for one in readable), progress)
    by_key: dict[str, Values] = {}
    for one, values in zip(readable, count_values(readable, report), strict=True):
        file = next(iter(one.files), None)
        if isinstance(values, Exception):
            damage.append(Damage("unreadable", str(values), file, (one.key,)))
            continue
        by_key[one.key] = values
        if values.nans:
            message = f"{counted(values.nans, 'element')} of {one.numel:,} NaN"
            damage.append(Damage("NaN", message, file, (one.key,)))
        if values.infs:
            message = f"{counted(values.infs, 'element')} of {one.numel:,} infinite"
            damage.append(Damage("Inf", message, file, (one.key,)))
    return by_key


def _duplicates(by_key: dict[str, Values], ties: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Tensors of equal values; of constant ones (zeros, ones) that says nothing."""
    again = {key for tie in ties for key in tie[1:]}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, values in by_key.items():
        if key not in again and values.min != values.max:
            groups[values.digest].append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


class _Report:
    """Adds up what threads have read."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done, self._lock = 0, threading.Lock()

    def __call__(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._what, self._done, self._total)
