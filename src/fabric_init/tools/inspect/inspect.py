"""Inspect a path: survey the headers, then, on request, compare checksums and read values."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fabric_init._text import counted
from fabric_init.checkpoints.formats.torch_save.reader import TorchFileReader
from fabric_init.checkpoints.known_formats import DCP, DEEPSPEED, INDEX, SAFETENSORS, TORCH, find_format
from fabric_init.checkpoints.registry import Candidate, Format
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.checkpoints.storage.manifest import Manifest
from fabric_init.checkpoints.storage.remote import AnyPath, RemotePath
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from fabric_init.tools.inspect.contents import CheckpointContents, Damage, FileRow, TensorRow, Values
from fabric_init.tools.inspect.survey import Survey, SurveyedTensor
from fabric_init.tools.inspect.surveys.dcp import survey_dcp
from fabric_init.tools.inspect.surveys.indexed_files import survey_index, survey_unindexed, unindexed_shards
from fabric_init.tools.inspect.surveys.readers import survey_deepspeed, survey_reader
from fabric_init.tools.inspect.surveys.safetensors import survey_safetensors
from fabric_init.tools.inspect.surveys.torch_save import survey_torch
from fabric_init.tools.inspect.value_statistics import count_values

Progress = Callable[[str, int, int], None]
"""Called with the current task, the bytes done and their total; from several threads, one at a time."""


def inspect(
    path: str | os.PathLike[str] | RemotePath,
    *,
    entry: str | None = None,
    manifest: str | os.PathLike[str] | None = None,
    match: Sequence[str] = (),
    values: bool = False,
    progress: Progress | None = None,
) -> CheckpointContents:
    """Return the contents and the damage of a checkpoint. Weights are read for ``values`` and ``manifest`` only.

    Args:
        path: anything that :func:`~fabric_init.checkpoints.open_checkpoint` takes.
        entry: the state dict to inspect; all of them by default.
        manifest: SHA-256 checksums to compare every file with.
        match: globs of the tensors to list; all by default. Files and damage are always listed.
        values: also read every element, in bounded memory.
        progress: called with the progress of reading.

    Raises:
        CheckpointNotFoundError: the path does not exist.
        CheckpointFormatError: the format is unknown, there is no header, or a pickle contains code.
    """
    sums = None if manifest is None else Manifest(manifest)
    candidate = Candidate(path, mmap=False, entry=entry)
    try:
        survey, root = _survey_headers(candidate)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointFormatError(f"{path} cannot be opened: {error}. Check the path and permissions.") from error
    listed = [each for each in survey.found if not match or any(fnmatchcase(each.key, glob) for glob in match)]
    shown = {each.key for each in listed}
    damage = list(survey.damage)
    if sums is not None:
        damage += _compare_digests(sums, survey, root, progress)
    by_key: dict[str, Values] = {}
    if values:
        by_key = _read_values(listed, damage, progress)
    ties = tuple(tie for tie in survey.ties if shown.intersection(tie))
    return CheckpointContents(
        path=candidate.asked,
        format=survey.format,
        note="; ".join(survey.notes) or None,
        tensors=tuple(_row(each, by_key.get(each.key)) for each in listed),
        files=_file_rows(survey),
        entries=survey.entries,
        ties=ties,
        duplicates=_duplicates(by_key, ties),
        damage=tuple(damage),
    )


def _survey_headers(asked: Candidate) -> tuple[Survey, AnyPath]:
    """Survey the headers; return the survey and the folder of the files."""
    try:
        file_format, candidate = find_format(asked)
    except CheckpointFormatError:
        names = unindexed_shards(asked.names)
        if not names or not isinstance(asked.path, Path):
            raise
        return survey_unindexed(asked.path, names, _survey_shard), asked.path
    surveyor = _SURVEYS.get(file_format)
    survey = survey_reader(file_format.open(candidate)) if surveyor is None else surveyor(file_format, candidate)
    if survey.readable and not survey.damage:
        try:
            file_format.open(candidate)
        except CheckpointError as error:  # a checkpoint that the reader refuses is not sound
            survey.damage.append(Damage("unreadable", str(error)))
    survey.notes[:0] = [candidate.origin] if candidate.origin else []
    return survey, candidate.path if candidate.is_dir else candidate.path.parent


def _safetensors_survey(_: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    return survey_safetensors(open_bytes(candidate.path, mmap=False))


def _index_survey(_: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    return survey_index(candidate.path, _survey_shard)


def _torch_survey(file_format: Format, candidate: Candidate) -> Survey:
    try:
        return survey_torch(open_bytes(candidate.path, mmap=False), candidate.entry)
    except Exception as error:  # a corrupt pickle calls allowed functions with wrong arguments, which raise anything
        reader = file_format.open(candidate)  # its errors are more precise
        if isinstance(error, CheckpointError):
            raise
        return survey_reader(reader)


def _dcp_survey(file_format: Format, candidate: Candidate) -> Survey:
    folder = candidate if candidate.is_dir else candidate.at(candidate.path.parent)
    if not isinstance(folder.path, Path):
        return survey_reader(file_format.open(folder))
    return survey_dcp(folder.path, folder.entry)


def _deepspeed_survey(file_format: Format, candidate: Candidate) -> Survey:
    candidate.refuse_entry()
    if not isinstance(candidate.path, Path):
        return survey_reader(file_format.open(candidate))
    return survey_deepspeed(candidate.path)


_SURVEYS: dict[Format, Callable[[Format, Candidate], Survey]] = {
    INDEX: _index_survey,
    SAFETENSORS: _safetensors_survey,
    TORCH: _torch_survey,
    DCP: _dcp_survey,
    DEEPSPEED: _deepspeed_survey,
}


def _survey_shard(path: AnyPath) -> Survey:
    """Survey one shard, by its suffix as the reader does."""
    if path.suffix == ".safetensors":
        return survey_safetensors(open_bytes(path, mmap=False))
    try:
        return survey_torch(open_bytes(path, mmap=False), None)
    except Exception as error:
        if isinstance(error, CheckpointNotFoundError):
            raise
        return survey_reader(TorchFileReader(path, mmap=False))


def _row(tensor: SurveyedTensor, values: Values | None) -> TensorRow:
    offset = tensor.extent[0] if tensor.extent is not None else None
    return TensorRow(
        tensor.key, tensor.shape, tensor.dtype, tensor.nbytes, tuple(tensor.files), offset, tensor.whole, values
    )


def _file_rows(survey: Survey) -> tuple[FileRow, ...]:
    tensors: defaultdict[str, int] = defaultdict(int)
    nbytes: defaultdict[str, int] = defaultdict(int)
    again = {key for tie in survey.ties for key in tie[1:]}
    for tensor in survey.found:
        for name, part in tensor.files.items():
            tensors[name] += 1
            nbytes[name] += 0 if tensor.key in again else part
    return tuple(FileRow(name, size, tensors[name], nbytes[name]) for name, size in survey.files.items())


def _compare_digests(sums: Manifest, survey: Survey, root: AnyPath, progress: Progress | None) -> list[Damage]:
    """Compare every byte of every file with the manifest."""
    sizes = {name: size for name, size in survey.files.items() if size is not None}
    report = _Report("digests", sum(sizes.values()), progress)
    damage = []
    for name in sizes:
        try:
            ranges = sums.differing(root / name, report)
        except CheckpointError as error:
            damage.append(Damage("digest", str(error), name))
            continue
        for start, stop in ranges:
            hit = tuple(
                each.key
                for each in survey.found
                if name in each.files and each.extent is not None and each.extent[0] < stop and start < each.extent[1]
            )
            message = f"bytes {start:,} to {stop:,}: SHA-256 mismatch with {sums.path}"
            damage.append(Damage("digest", message, name, hit))
    return damage


def _read_values(
    tensors: Sequence[SurveyedTensor], damage: list[Damage], progress: Progress | None
) -> dict[str, Values]:
    readable = [tensor for tensor in tensors if tensor.runs and tensor.whole]
    report = _Report("values", sum(tensor.nbytes for tensor in readable), progress)
    by_key: dict[str, Values] = {}
    for tensor, values in zip(readable, count_values(readable, report), strict=True):
        file = next(iter(tensor.files), None)
        if isinstance(values, Exception):
            damage.append(Damage("unreadable", str(values), file, (tensor.key,)))
            continue
        by_key[tensor.key] = values
        if values.nans:
            message = f"{counted(values.nans, 'element')} of {tensor.numel:,} NaN"
            damage.append(Damage("NaN", message, file, (tensor.key,)))
        if values.infs:
            message = f"{counted(values.infs, 'element')} of {tensor.numel:,} infinite"
            damage.append(Damage("Inf", message, file, (tensor.key,)))
    return by_key


def _duplicates(by_key: dict[str, Values], ties: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return groups of tensors with equal values; constant ones (zeros, ones) are not compared."""
    again = {key for tie in ties for key in tie[1:]}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key, values in by_key.items():
        if key not in again and values.min != values.max:
            groups[values.digest].append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


class _Report:
    """Sum up the bytes that threads have read."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self._what, self._total, self._progress = what, total, progress
        self._done, self._lock = 0, threading.Lock()

    def __call__(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._what, self._done, self._total)
