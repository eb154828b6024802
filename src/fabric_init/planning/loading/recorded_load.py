"""Let load code run on tensors without values, and read from the record what it has left in the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init._text import joined
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import BaseReader, CheckpointReader, Region, TensorSpec
from fabric_init.checkpoints.reader import is_collective, read
from fabric_init.planning.loading.functions import Functions, Sources, made_by
from fabric_init.planning.loading.regions import Evaluation, copied_source, is_copy_of, sources_of
from fabric_init.planning.tensors import named_modules
from fabric_init.recording.mode import RecordMode
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.storage_tags import ref_of
from fabric_init.recording.tape import Rng, Tape, TensorRef
from fabric_init.recording.tensor import RecordedTensor, meta_of, recorded


class Outcome(NamedTuple):
    """What load code says of a state dict, in names of it."""

    missing: frozenset[str] | None
    """Names that it lacks; ``None`` for all of the state dict that got no value."""
    unexpected: tuple[str, ...]


class RecordedLoad(NamedTuple):
    """What load code has made of a checkpoint."""

    reader: CheckpointReader
    """The checkpoint, in which what was computed from its tensors has keys, too."""
    names: Mapping[str, str]
    """The name in the state dict for each key."""
    key_of: Mapping[str, str]
    """Tensor name → the key in ``reader`` that has its value. Names of any kind of tensor."""
    outcome: Outcome
    below: CheckpointReader
    """The checkpoint itself."""
    undo: Callable[[], None]
    """Make the modules what they were before."""
    again: Callable[[CheckpointReader, Any], RecordedLoad | None] = lambda reader, options: None
    """What load code makes of another reader with other options; the modules stay as they are."""


class LoadCode(Protocol):
    """Loads a state dict into a model, both without values."""

    replaces: bool
    """Whether the parameters that it makes are to be in the model, as in plain PyTorch, or only their values."""

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        """Load ``state``."""
        ...


def record_load(
    model: nn.Module,
    reader: CheckpointReader,
    names: Mapping[str, str],
    code: LoadCode,
    rng: Rng,
    functions: Functions = MappingProxyType({}),
) -> RecordedLoad:
    """Run load ``code`` on ``model``; if it fails, the modules are as they were before.

    Args:
        model: The recorded model.
        reader: The open checkpoint.
        names: The name in the state dict for each key of the checkpoint, and each that a function makes.
        code: What loads.
        rng: The mode of the recording that the model is on.
        functions: What makes tensors of the checkpoint's, by key.
    """
    modules = named_modules(model)
    kept = [(module, _contents(module)) for module in {id(m): m for _, m in modules}.values()]

    def undo() -> None:
        for module, contents in kept:
            vars(module).clear()
            vars(module).update(contents)

    try:
        generator = torch.get_rng_state()
        extra = copy.deepcopy(dict(reader.extra_state))
        try:
            with RecordMode(rng) as mode, torch.no_grad():
                mode.recorder.own_init_counts = True  # as plain PyTorch has initialized what a load comes to
                places = _put_stand_ins(modules, mode.recorder)
                sources = Sources(mode.recorder, reader)
                state = {
                    name: made_by(functions, key, sources)
                    if key in functions
                    else (extra if key in extra else sources)[key]
                    for key, name in names.items()
                }
                outcome = code(model, state)
        finally:
            torch.set_rng_state(generator)
        refs = _left_behind(modules, places, mode.tape)
        _put_back(modules, places, replaces=code.replaces)
        made = RecordedReader(reader, mode.tape, refs)
        of_functions = {key: state[names[key]] for key in functions if key in names}
        for key, tensor in of_functions.items():
            made.specs.setdefault(key, TensorSpec(tensor.shape, tensor.dtype, "made by convert"))
        unused = [name for key, name in names.items() if key not in made.used]
        outcome = outcome._replace(unexpected=_known(outcome.unexpected, names.values(), unused))
        return RecordedLoad(made, names, made.key_of, outcome, reader, undo)
    except BaseException:
        undo()
        raise


def _known(unexpected: Iterable[str], names: Collection[str], unused: Sequence[str]) -> tuple[str, ...]:
    """Return names of the state dict for names that load code has made of them."""
    known = set(names)
    found = [name if name in known else next(iter(get_close_matches(name, unused, 1, 0)), None) for name in unexpected]
    return tuple(dict.fromkeys(name for name in found if name is not None))


class _Place(NamedTuple):
    """Where a module keeps a tensor, and what stands in for it there while load code runs."""

    name: str
    table: dict[str, Tensor | None]
    key: str
    original: Tensor
    stand_in: Tensor


def _put_stand_ins(modules: Iterable[tuple[str, nn.Module]], recorder: Recorder) -> list[_Place]:
    """Put copies on the tape in the place of the model's tensors: the load does not change their history."""
    copies: dict[int, Tensor] = {}
    originals: dict[int, Tensor] = {}
    places = []
    for prefix, module in modules:
        dot = f"{prefix}." if prefix else ""
        tables: tuple[Any, ...] = (module._parameters, module._buffers)
        for table in tables:
            for key, tensor in table.items():
                if tensor is None or is_lazy(tensor):
                    continue
                original = originals.get(id(tensor), tensor)  # of a module under its second name
                if id(original) not in copies:
                    copies[id(original)] = copied = _copy(original, recorder)
                    originals[id(copied)] = original
                table[key] = copies[id(original)]
                places.append(_Place(dot + key, table, key, original, copies[id(original)]))
    return places


def _copy(tensor: Tensor, recorder: Recorder) -> Tensor:
    found = recorded(tensor)
    if found is None or found.memory is not None:
        with DisableTorchFunction():
            copied = recorder.constant(tensor.detach() if found is None else found.tape.later.value(tensor, "be read"))
    else:
        copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _left_behind(
    modules: Iterable[tuple[str, nn.Module]], places: Iterable[_Place], tape: Tape
) -> dict[str, TensorRef]:
    """Return by name the values on the tape that load code has left in the model."""
    stand_ins = {id(place.stand_in) for place in places}
    refs = {}
    with DisableTorchFunction():
        for prefix, module in modules:
            dot = f"{prefix}." if prefix else ""
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                found = None if tensor is None else recorded(tensor)
                if tensor is None or found is None or found.memory is not None or found.tape is not tape:
                    continue
                ref = ref_of(meta_of(tensor), found.storage)
                if id(tensor) in stand_ins:
                    made, *later = tape.writers[found.storage]
                    if not later or is_copy_of(tape, ref, made):
                        continue
                refs[dot + key] = ref
    return refs


def _put_back(modules: Iterable[tuple[str, nn.Module]], places: Iterable[_Place], *, replaces: bool) -> None:
    """Put the model's own tensors back, but for what load code has removed, replaced or given another shape."""
    originals = {id(place.stand_in): place.original for place in places}
    for _, table, key, original, stand_in in places:
        tensor = table.get(key)
        mine = tensor is stand_in or (isinstance(tensor, RecordedTensor) and not replaces)
        if tensor is None or not mine or not _alike(tensor, original):
            originals.pop(id(stand_in), None)
            continue
        if stand_in.requires_grad != original.requires_grad and original.is_leaf:
            original.requires_grad_(stand_in.requires_grad)
        table[key] = original
    for _, module in modules:
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and id(value) in originals:
                vars(module)[name] = originals[id(value)]


def _alike(one: Tensor, other: Tensor) -> bool:
    with DisableTorchFunction():
        return (one.size(), one.dtype) == (other.size(), other.dtype)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, with copies of its tables: all that is put back if a load fails."""
    return {
        name: value.copy() if type(value) in (dict, OrderedDict, set) and name.startswith("_") else value
        for name, value in vars(module).items()
    }


class RecordedReader(BaseReader):
    """A checkpoint after load code; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`.

    A tensor that is a copy of one in the checkpoint keeps its key. What was computed has a key of its own: its name.

    Args:
        below: The checkpoint.
        tape: The tape that the load was recorded on.
        refs: Name → the tensor's value on the tape.
    """

    def __init__(self, below: CheckpointReader, tape: Tape, refs: Mapping[str, TensorRef]) -> None:
        self.path, self.format, self.note, self.extra_state = below.path, below.format, below.note, below.extra_state
        self.collective = is_collective(below)
        self._below = below
        self._values = Evaluation(tape, whole=self.collective)
        self._made: dict[str, TensorRef] = {}
        self.key_of: dict[str, str] = {}
        """Name → key."""
        self.used: set[str] = set()
        """The keys of the checkpoint that something is loaded from."""
        self.specs: dict[str, TensorSpec] = {key: below.spec(key) for key in below.keys()}
        for name, ref in refs.items():
            source = copied_source(tape, ref)
            if source is not None and source.reader is below:
                self.key_of[name] = source.key
                self.used.add(source.key)
                continue
            key = name
            while key in self.specs:
                key += " (converted)"
            sources = sources_of(tape, ref)
            self.used.update(sources)
            made = "computed from " + (joined(sources, most=3) if sources else "what the model has")
            self.specs[key] = TensorSpec(ref.size, ref.dtype, made)
            self._made[key], self.key_of[name] = ref, key

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Return the tensor, or a region of it; of its sources, only what the region needs is read."""
        ref = self._made.get(key)
        return self._below.read(key, region) if ref is None else self._values.region(ref, region)

    def reading(self, key: str) -> Callable[[Tape], Tensor]:
        """Return what reads the whole tensor, given the tape, which it does not keep alive."""
        ref, below = self._made.get(key), self._below
        if ref is None:
            return lambda _: read(below, key)
        return lambda tape: Evaluation(tape).region(ref, None)
