"""A look at one file of ``torch.save``, zip or legacy, that does not stop at the first thing wrong.

Its pickle says which tensors there are and how large their storages should be; :mod:`.torch_records` says which bytes
of the file are those storages. Neither asks for more of the file than that: a weight is read only by what is returned.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, BinaryIO

import torch

from fabric_init._text import counted, dtype_name
from fabric_init.checkpoints.formats.pickles.limits import check_calls
from fabric_init.checkpoints.formats.torch_save.meta_tensors import MetaStorages, load_meta, read_region
from fabric_init.checkpoints.formats.torch_save.reader import checked_key, count_tensors, state_dicts_in
from fabric_init.checkpoints.region import Span, Window
from fabric_init.checkpoints.state_dicts import Location, choose_state_dict, describe
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.errors import CheckpointFormatError
from fabric_init.tools.inspect.contents import Damage
from fabric_init.tools.inspect.survey import ElementRun, Survey, SurveyedTensor, sharing_bytes
from fabric_init.tools.inspect.surveys.torch_records import Records, legacy_records, zip_records


def survey_torch(file: FileBytes, entry: str | None) -> Survey:
    """Return what the pickle lists, compared with what the file holds.

    Args:
        file: read as it is, never mapped.
        entry: the state dict that is meant. Without it, where several could be, the survey has all of them.

    Raises any exception when the pickle cannot be read.
    """
    legacy = not file.head(4).startswith(b"PK\3\4")
    claims = MetaStorages()
    records: Records
    if legacy:

        def load(pickle: BinaryIO) -> Any:
            return load_meta(pickle, claims.storage, legacy=True)

        loaded, records = legacy_records(file, load, claims.sizes, claims.counts)
    else:
        pickle, records = zip_records(file)
        check_calls(pickle, file.size)
        loaded = load_meta(io.BytesIO(pickle), claims.storage)
        records.place(claims.sizes)
    if not isinstance(loaded, dict):
        raise CheckpointFormatError(f"{file.path} holds a {type(loaded).__name__}, not a state dict.")
    name = file.path.name
    survey = Survey("torch", files={name: file.size}, damage=records.damage, readable=not legacy)
    if legacy:
        survey.notes.append("legacy format of before torch 1.6")
    taken = _choose(survey, file, loaded, entry)
    for prefix, state in taken.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                survey.found.append(_found(survey, file, claims, records, prefix, key, value))
    survey.ties = [tuple(one.key for one in group) for group in sharing_bytes(survey.found)]
    _report(survey, claims, records, file)
    return survey


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one after the last."""
    first, size = int(tensor.storage_offset()), tensor.element_size()
    return first * size, (first + Window(0, tuple(tensor.shape), tensor.stride()).extent) * size


def _choose(
    survey: Survey, file: FileBytes, loaded: dict[object, object], entry: str | None
) -> Mapping[str, dict[object, object]]:
    """Return the state dicts to show, with the prefix of their keys."""
    found: dict[Location, dict[object, object]] = dict(state_dicts_in(loaded))
    counts = {location: count_tensors(state) for location, state in found.items()}
    survey.entries = {".".join(location): number for location, number in counts.items()}
    try:
        location = choose_state_dict(file.path, counts, entry)
    except CheckpointFormatError:
        if entry is not None or len(counts) < 2:
            raise
        survey.notes.append(f"{len(counts)} state dicts, of which a load takes the one that entry= names")
        survey.readable = False
        return {"".join(f"{part}." for part in location): found[location] for location in counts}
    survey.notes += [note for note in [describe(location)] if note]
    return {"": found[location]}


def _found(
    survey: Survey,
    file: FileBytes,
    claims: MetaStorages,
    records: Records,
    prefix: str,
    key: object,
    value: torch.Tensor,
) -> SurveyedTensor:
    shown = f"{prefix}{key}"
    nbytes = max(0, math.prod(value.shape)) * value.element_size()
    one = SurveyedTensor(shown, tuple(value.shape), dtype_name(value.dtype), nbytes, {file.path.name: nbytes})
    try:
        checked_key(file.path, key, value, claims)
    except CheckpointFormatError as error:
        message = str(error).removeprefix(f"{file.path}: ")
        survey.damage.append(Damage("unreadable", message, file.path.name, (shown,)))
        one.whole = False
        return one
    storage = claims.key(value)
    start, (first, stop) = records.starts.get(storage), _extent(value)
    if start is None or storage in records.wrong:
        one.whole = False
    else:
        one.extent = start + first, start + stop
        one.whole = one.extent[1] <= file.size
    if one.whole and start is not None:
        ordered = _in_order(value)
        one.layout = None if ordered is value else (value.shape, value.stride())
        one.runs = (ElementRun(ordered.numel(), partial(_read, file, start, ordered)),)
    return one


def _in_order(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same elements that reads fast: values are only counted, so any order will do."""
    if value.is_contiguous():
        return value
    first, stop = _extent(value)
    covered = (stop - first) // value.element_size()
    if value.numel() > covered:  # an expanded one repeats what it covers, and may say so a billion times
        return value.as_strided((covered,), (1,))
    strides = value.stride()
    return value.permute(sorted(range(value.dim()), key=lambda dim: -strides[dim]))


def _read(file: FileBytes, offset: int, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return read_region(file, offset, tensor, Span(start, stop)).reshape(-1)


def _report(survey: Survey, claims: MetaStorages, records: Records, file: FileBytes) -> None:
    """Report which tensors the damaged storages belong to."""
    name = file.path.name
    cut = tuple(one.key for one in survey.found if not one.whole and (one.extent is None or one.extent[1] > file.size))
    wrong = {key: message for key, message in records.wrong.items() if key in claims.sizes}
    explained = {key for one in survey.damage for key in one.tensors}
    cut = tuple(key for key in cut if key not in explained)
    if records.truncated:
        message = f"ends at byte {file.size:,} before all of it is there: {counted(len(cut), 'tensor')} not whole"
        survey.damage.insert(0, Damage("truncated", message, name, cut))
    elif wrong:
        shown = "; ".join(list(wrong.values())[:3]) + ("; …" if len(wrong) > 3 else "")
        survey.damage.append(Damage("wrong size", shown, name, cut))
    elif cut:
        survey.damage.append(Damage("unreadable", "their storages are not in the file", name, cut))
