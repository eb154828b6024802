"""A look at one safetensors file that does not stop at the first thing wrong.

The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch

from fabric_init._text import counted, dtype_name
from fabric_init.checkpoints.formats.safetensors import DTYPES, HEADER_BYTES
from fabric_init.checkpoints.region import Window
from fabric_init.checkpoints.storage.local import FileBytes
from fabric_init.errors import CheckpointFormatError
from fabric_init.tools.inspect.contents import Damage
from fabric_init.tools.inspect.survey import ElementRun, Survey, SurveyedTensor

_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {code: 8 * dtype.itemsize for code, dtype in DTYPES.items()}


class _HeaderEntry(NamedTuple):
    key: str
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def survey_safetensors(file: FileBytes) -> Survey:
    """Return what the header lists, compared with what the file holds.

    Raises :class:`~fabric_init.errors.CheckpointFormatError` when there is no whole header to read.
    """
    name = file.path.name
    survey = Survey("safetensors", files={name: file.size})
    header, start = _header(file, survey)
    entries = [entry for key, value in header.items() if (entry := _entry(survey, name, key, value, start))]
    entries.sort(key=lambda entry: (entry.start, entry.stop))  # stable: the order of the data
    _compare(survey, name, entries, start, file.size)
    for entry in entries:
        dtype = DTYPES.get(entry.code)
        one = SurveyedTensor(
            entry.key,
            entry.shape,
            entry.code if dtype is None else dtype_name(dtype),
            entry.stop - entry.start,
            {name: entry.stop - entry.start},
            (entry.start, entry.stop),
            whole=entry.stop <= file.size,
        )
        if one.whole and dtype is not None:
            one.runs = (ElementRun(math.prod(entry.shape), partial(_read, file, dtype, entry.start)),)
        survey.found.append(one)
    return survey


def _read(file: FileBytes, dtype: torch.dtype, offset: int, start: int, stop: int) -> torch.Tensor:
    return file.tensor(dtype, offset, Window(start, (stop - start,), (1,)))


def _header(file: FileBytes, survey: Survey) -> tuple[dict[str, Any], int]:
    """Return the header, and the offset of the first byte behind it."""
    length = int.from_bytes(file.head(8), "little")
    if file.size < 8 or length > min(HEADER_BYTES, file.size - 8):
        raise CheckpointFormatError(
            f"{file.path} ends within its header: it has {file.size:,} bytes, its header {length + 8:,}. Nothing in it "
            f"can be told; fetch it again."
        )
    twice: Counter[str] = Counter()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.update(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return found

    try:
        header = json.loads(file.head(8 + length)[8:], object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{file.path}: its header is not JSON: {error}. Fetch or save it again.") from error
    if not isinstance(header, dict):
        raise CheckpointFormatError(f"{file.path}: its header is no JSON object. Fetch or save it again.")
    if twice:
        message = "given twice by the header; which one is meant cannot be told"
        survey.damage.append(Damage("listed twice", message, file.path.name, tuple(twice)))
    header.pop("__metadata__", None)
    return header, 8 + length


def _entry(survey: Survey, name: str, key: str, value: object, start: int) -> _HeaderEntry | None:
    """One tensor of the header, with its place in the file; ``None``, and damage, where it makes no sense."""
    fields = value if isinstance(value, dict) else {}
    code, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    sizes = shape if isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape) else None
    places = offsets if isinstance(offsets, list) and all(type(n) is int and n >= 0 for n in offsets) else []
    if not isinstance(code, str) or sizes is None or len(places) != 2 or places[0] > places[1]:
        message = f"its header entry makes no sense: {json.dumps(value)[:200]}"
        survey.damage.append(Damage("unreadable", message, name, (key,)))
        return None
    if code not in DTYPES:
        message = f"its dtype {code} is none that torch {torch.__version__} can hold as a plain tensor"
        survey.damage.append(Damage("unknown dtype", message, name, (key,)))
    entry = _HeaderEntry(key, code, tuple(sizes), start + places[0], start + places[1])
    needed = -(-math.prod(sizes) * _BITS[code] // 8) if code in _BITS else places[1] - places[0]
    if needed != places[1] - places[0]:
        message = f"takes {needed:,} bytes by shape and dtype, and {places[1] - places[0]:,} by its offsets"
        survey.damage.append(Damage("wrong size", message, name, (key,)))
        return None
    return entry


def _compare(survey: Survey, name: str, entries: list[_HeaderEntry], start: int, size: int) -> None:
    """Tensors must follow one another without a gap, from the header to the end of the file."""
    reach, before = start, ""
    for entry in entries:
        if entry.start > reach:
            message = f"{entry.start - reach:,} bytes from {reach:,} on belong to no tensor"
            survey.damage.append(Damage("gap", message, name))
        elif entry.start < min(reach, entry.stop):
            message = f"both have bytes {entry.start:,} to {min(reach, entry.stop):,}"
            survey.damage.append(Damage("overlap", message, name, (before, entry.key)))
        if entry.stop > reach:
            reach, before = entry.stop, entry.key
    if reach > size:
        cut = tuple(entry.key for entry in entries if entry.stop > size)
        partly = sum(entry.start < size for entry in entries if entry.stop > size)
        message = (
            f"ends at byte {size:,}, {reach - size:,} too early: {counted(len(cut) - partly, 'tensor')} beyond its "
            f"end, {partly} in part"
        )
        survey.damage.append(Damage("truncated", message, name, cut))
    elif reach < size:
        message = f"{size - reach:,} bytes after the last tensor, from {reach:,} on"
        survey.damage.append(Damage("trailing bytes", message, name))
