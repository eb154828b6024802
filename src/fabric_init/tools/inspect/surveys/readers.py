"""A look at what only a reader understands: DeepSpeed's folders, and formats of others."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fabric_init._text import dtype_name
from fabric_init.checkpoints.formats.deepspeed.layout import parameter_shapes
from fabric_init.checkpoints.formats.deepspeed.reader import STAND_INS, DeepSpeedFolderReader, states_in, tag_folder
from fabric_init.checkpoints.formats.torch_save.reader import load_archive
from fabric_init.checkpoints.reader import CheckpointReader
from fabric_init.checkpoints.region import Span
from fabric_init.checkpoints.storage.local import open_bytes
from fabric_init.errors import CheckpointError
from fabric_init.tools.inspect.contents import Damage
from fabric_init.tools.inspect.survey import ElementRun, Survey, SurveyedTensor


def survey_reader(reader: CheckpointReader) -> Survey:
    """Return what a reader reports of its checkpoint."""
    survey = Survey(reader.format, readable=False)
    survey.notes = [reader.note] if reader.note else []
    name = reader.path.name
    if isinstance(reader.path, Path) and reader.path.is_file():
        survey.files[name] = reader.path.stat().st_size
    for key in reader.keys():
        spec = reader.spec(key)
        nbytes = spec.shape.numel() * spec.dtype.itemsize
        one = SurveyedTensor(key, tuple(spec.shape), dtype_name(spec.dtype), nbytes, {name: nbytes})
        one.runs = (ElementRun(spec.shape.numel(), partial(_read, reader, key)),)
        survey.found.append(one)
    return survey


def _read(reader: CheckpointReader, key: str, start: int, stop: int) -> torch.Tensor:
    return reader.read(key, Span(start, stop))


def survey_deepspeed(path: Path) -> Survey:
    """Return what the pickles of all ranks list; of an incomplete folder, what the first one lists.

    Raises :class:`~fabric_init.errors.CheckpointError` when not even that can be read.
    """
    folder = tag_folder(path)
    files = {file.name: file.stat().st_size for file in states_in(folder)}
    try:
        reader = DeepSpeedFolderReader(path)
    except CheckpointError as error:
        survey = _survey_damaged(folder, error)
    else:
        survey = survey_reader(reader)
        places: defaultdict[object, list[str]] = defaultdict(list)
        for one in survey.found:
            one.files = reader.files(one.key)
            if one.nbytes > sum(files.values()):
                message = f"takes {one.nbytes:,} bytes by its shape, more than all files together"
                survey.damage.append(Damage("wrong size", message, None, (one.key,)))
                one.whole = False
            if one.runs[0].numel:
                places[reader.read(one.key, Span(0, 1)).data_ptr(), one.shape].append(one.key)
        survey.ties = [tuple(keys) for keys in places.values() if len(keys) > 1]
    survey.files = files | {name: size for name, size in survey.files.items() if size is None}
    return survey


def _survey_damaged(folder: Path, error: CheckpointError) -> Survey:
    survey = Survey("DeepSpeed", readable=False)
    first: dict[Any, Any] | None = None
    for file in states_in(folder):
        try:
            _, loaded = load_archive(open_bytes(file, mmap=False), STAND_INS)
        except CheckpointError as wrong:
            survey.damage.append(Damage("unreadable", str(wrong), file.name))
        else:
            is_model = file.name.endswith("model_states.pt") and isinstance(loaded, dict)
            first = loaded if first is None and is_model else first
    if first is None:
        raise error
    if not survey.damage:
        survey.damage.append(Damage("unreadable", str(error)))
    trained: dict[str, torch.Size] = {}
    with suppress(ValueError):  # what is damaged has been said
        trained = {key: shape for group in parameter_shapes(first) for key, shape in group.items()}
    module = first.get("module")
    for key, value in (module if isinstance(module, dict) else {}).items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            # Parts of a trained one are in the ranks' files; with one of them unreadable it is not whole.
            shape, dtype = trained.get(key, value.shape), torch.float32 if key in trained else value.dtype
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            survey.found.append(SurveyedTensor(key, tuple(shape), dtype_name(dtype), nbytes, {}, whole=False))
    return survey
