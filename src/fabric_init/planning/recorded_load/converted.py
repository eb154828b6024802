"""A checkpoint after conversions: functions of its tensors, recorded on sources, make others.

What a declaration (``Split``, ``Fuse``, …) does with tensors of some shapes is recorded once and repeated for others of
these shapes, so thousands of experts do not take thousands of recordings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fabric_init._gc import PausedCollector
from fabric_init._text import joined
from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, get_current_function_mode_stack
from fabric_init.checkpoints import CheckpointReader, Conversion, ConversionResult, Dequantize
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.computed import ComputedReader, Value
from fabric_init.planning.recorded_load.key_tensors import (
    KeyTensor,
    KeyTensors,
    recorded_on_sources,
    source_read_by,
    source_tensor,
)
from fabric_init.planning.recorded_load.regions import sources_of
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import recorded

Functions = Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]]
"""By new key: a function that is given the tensors of the checkpoint by key, and returns the new one."""
Convert = Sequence[Conversion | Dequantize | Functions] | Functions
"""What ``convert=`` takes."""


def converted(reader: CheckpointReader, convert: Convert) -> CheckpointReader:
    """Apply conversions to ``reader``, one after the other. Only headers are read, unless a function looks at values.

    Raises:
        CheckpointMismatchError: The checkpoint is not as declared, or two of its tensors would get one key.
        TypeError: ``convert`` is no list of conversions, or a function does not return tensors.
    """
    steps = [convert] if isinstance(convert, Mapping) else convert
    if not isinstance(steps, Sequence):
        raise TypeError(f"convert must be a list of conversions, such as [Split(…), …], got {convert!r}")
    for step in steps:
        if isinstance(step, Mapping) and all(map(callable, step.values())):
            reader = _after(reader, f"convert={{{joined([f'{key!r}: …' for key in step], 3)}}}", step)
        elif not isinstance(step, Dequantize) and (
            isinstance(step, type) or not callable(getattr(step, "results", None))
        ):
            raise TypeError(f"convert must be a list of conversions (Split, Fuse, …), got {step!r}")
        else:
            reader = _after(reader, str(step), step)
    return reader


def _after(below: CheckpointReader, name: str, step: Conversion | Dequantize | Functions) -> CheckpointReader:
    """Return the reader after one step, which errors call ``name``."""
    try:
        if get_current_function_mode_stack():  # an open block, say: modes are a thread's own
            with ThreadPoolExecutor(1) as thread:
                reader, count = thread.submit(_reader_after, below, step).result()
        else:
            reader, count = _reader_after(below, step)
    except CheckpointMismatchError as error:
        raise CheckpointMismatchError(f"{below.path}: {name}: {error}.") from None
    reader.note = "; ".join(filter(None, [below.note, f"{name}: {count} tensors made"]))
    return reader


def _reader_after(below: CheckpointReader, step: Conversion | Dequantize | Functions) -> tuple[CheckpointReader, int]:
    """Return the reader after one step, and how many tensors that has made."""
    if isinstance(step, Dequantize):
        reader = step.opened(below)
        return reader, len(reader.weights)
    tape, values, used = _made(below, step)
    return ComputedReader(below, tape, values, _keys_after(below, values, used)), len(values)


def _made(below: CheckpointReader, step: Conversion | Functions) -> tuple[Tape, dict[str, Value], Collection[str]]:
    """Return a tape, what is made on it, by key, and the keys that this replaces."""
    with PausedCollector(), torch.inference_mode(False), torch.no_grad(), recorded_on_sources() as mode:
        if isinstance(step, Mapping):
            return mode.tape, *_made_by_functions(mode.recorder, below, step)
        return mode.tape, *_made_as_declared(mode.recorder, below, step)


def _made_by_functions(
    recorder: Recorder, below: CheckpointReader, functions: Functions
) -> tuple[dict[str, Value], Collection[str]]:
    sources = KeyTensors(recorder, below)
    values = {}
    for key, function in functions.items():
        try:
            ref = _ref(recorder, function(sources), f"convert[{key!r}]")
        except KeyError as error:
            raise CheckpointMismatchError(f"{key!r} asks for {error}, which the checkpoint does not have") from error
        values[key] = Value(ref, sources_of(recorder.tape, ref))
    return values, sources.made


def _made_as_declared(
    recorder: Recorder, below: CheckpointReader, conversion: Conversion
) -> tuple[dict[str, Value], Collection[str]]:
    specs = {key: below.spec(key) for key in below.keys()}
    values: dict[str, Value] = {}
    used: set[str] = set()
    records: dict[Any, _Record] = {}
    for made in conversion.results(specs):
        sources = [KeyTensor(below, key) for key in made.sources]
        alike = id(made.function), *((specs[key].shape, specs[key].dtype) for key in made.sources)
        if alike in records:
            refs = records[alike].repeated(recorder.tape, sources)
        else:
            records[alike] = record = _Record(made, recorder, sources, str(conversion))
            refs = record.refs
            if not record.repeats:
                del records[alike]
        values.update((key, Value(ref, made.sources)) for key, ref in zip(made.keys, refs, strict=True))
        used.update(made.sources)
    return values, used


class _Record:
    """What a function does with its sources: the ops, and where they leave its results."""

    def __init__(self, made: ConversionResult, recorder: Recorder, sources: Sequence[KeyTensor], name: str) -> None:
        before = len(recorder.tape.ops)
        results = list(made.function(*(source_tensor(recorder, source) for source in sources)))
        if len(results) != len(made.keys):
            raise TypeError(f"{name} returned {len(results)} tensors for {len(made.keys)} keys")
        self.refs = [_ref(recorder, result, name) for result in results]
        self._ops = list(islice(recorder.tape.ops.values(), before, None))
        self._function = made.function  # alive, so that no other has its id

    @property
    def repeats(self) -> bool:
        """Whether the same is done with other sources: no values were looked at, and no random numbers drawn."""
        read = any(source.read for op in self._ops if (source := source_read_by(op)) is not None)
        return not read and all(op.draw is None for op in self._ops)

    def repeated(self, tape: Tape, sources: Iterable[KeyTensor]) -> list[TensorRef]:
        """Write the ops to the tape once more, for other sources, and return where their results are."""
        copies: dict[int, int] = {}

        def copied(storage: int) -> int:
            if storage not in copies:
                copies[storage] = tape.add_storage(*tape.storages[storage])
            return copies[storage]

        others = iter(sources)
        for op in self._ops:
            tape.repeat(op, copied, None if source_read_by(op) is None else (next(others),))
        return [ref._replace(storage=copied(ref.storage)) for ref in self.refs]


def _ref(recorder: Recorder, result: object, name: str) -> TensorRef:
    """Return where a result is on the tape."""
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} returned {type(result).__name__}, not a tensor")
    with DisableTorchFunction(), DisableTorchDispatch():
        return recorder.ref(result if recorded(result) is not None else recorder.constant(result))


def _keys_after(below: CheckpointReader, values: Mapping[str, Value], used: Collection[str]) -> list[str]:
    """Return the keys after a conversion: what is made stands where its first source stood."""
    made: defaultdict[str | None, list[str]] = defaultdict(list)
    for key, value in values.items():
        made[next(iter(value.sources), None)].append(key)
    for key in below.keys():
        if key in values and key not in used:
            raise CheckpointMismatchError(f"it makes {key}, and the checkpoint has a tensor of that name already")
    return [name for key in below.keys() for name in (made[key] if key in used else (key,))] + made[None]
