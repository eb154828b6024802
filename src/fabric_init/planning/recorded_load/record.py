"""Let load code run on tensors without values, and read from the record what it has left in the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import read
from fabric_init.planning.recorded_load.computed import ComputedReader, Value
from fabric_init.planning.recorded_load.key_tensors import KeyTensors, recorded_on_sources
from fabric_init.planning.recorded_load.regions import Evaluation, copied_source, is_copy_of, sources_of
from fabric_init.planning.tensors import named_modules, named_tensors
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tape.tape import Rng, Tape, TensorRef
from fabric_init.recording.tensor.geometry import follow_meta
from fabric_init.recording.tensor.recorded_tensor import (
    RecordedTensor,
    become,
    become_recorded,
    make_recorded_tensor,
    meta_of,
    recorded,
    recorded_ref,
    whole_storage,
)


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
) -> RecordedLoad:
    """Run load ``code`` on ``model``; if it fails, the modules are as they were before.

    Args:
        model: The recorded model.
        reader: The open checkpoint.
        names: The name in the state dict for each key of the checkpoint.
        code: What loads.
        rng: The mode of the recording that the model is on.
    """
    modules = {id(module): module for _, module in named_modules(model)}.values()
    kept = [(module, _contents(module)) for module in modules]
    tables: list[Any] = [table for module in modules for table in (module._parameters, module._buffers)]
    places = [(table, key, tensor) for table in tables for key, tensor in table.items() if tensor is not None]

    def undo() -> None:
        for module, contents in kept:
            vars(module).clear()
            vars(module).update(contents)

    try:
        extra = copy.deepcopy(dict(reader.extra_state))
        with recorded_on_sources(rng) as mode:
            mode.tape.shares_seed = True  # of its own, it has none
            mode.recorder.own_init_counts = True  # as plain PyTorch has initialized what a load comes to
            moved = _moved(model, mode.recorder)
            try:
                sources = KeyTensors(mode.recorder, reader)
                state = {name: (extra if key in extra else sources)[key] for key, name in names.items()}
                outcome = code(model, state)
                refs = _left_behind(model, moved, mode.tape)
            finally:
                _move_back(moved)
        if not code.replaces:
            _put_back(places)
        made = RecordedReader(reader, mode.tape, refs)
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


class _Moved(NamedTuple):
    """A tensor of the model that is on a storage of its own while load code runs: a copy of what it holds.

    The Python object stays, so whatever holds it (lists, closures, optimizers, ties) takes part in the load. Its
    history does not: what the constructor has computed from it is on the storage that it goes back to.
    """

    tensor: Tensor
    real: Tensor | None
    """What it was, if it had values."""
    meta: Tensor | None
    """What was beside it, if it was recorded."""
    storage: int
    copied_by: int
    """The number of the op that has made the copy."""


def _moved(model: nn.Module, recorder: Recorder) -> list[_Moved]:
    tensors: dict[int, Tensor] = {}
    with DisableTorchFunction():
        for _, kind, tensor in named_tensors(model):
            if (
                is_lazy(tensor)
                or not tensor.is_leaf
                or (kind == "attribute" and not isinstance(tensor, RecordedTensor))
            ):
                continue
            if isinstance(tensor, RecordedTensor) or type(tensor) in (Tensor, nn.Parameter):
                tensors.setdefault(id(tensor), tensor)
    copies: dict[int, Tensor] = {}  # by storage: all of it, flat
    return [_move(tensor, recorder, copies) for tensor in tensors.values()]


def _move(tensor: Tensor, recorder: Recorder, copies: dict[int, Tensor]) -> _Moved:
    found = recorded(tensor)
    with torch.no_grad(), DisableTorchFunction(), DisableTorchDispatch():
        before = tensor._meta if isinstance(tensor, RecordedTensor) else None
        if found is None or found.memory is not None:
            value = tensor.detach() if found is None else found.tape.after_block.value(tensor, "be read")
            copied, real = recorder.constant(value), value
        else:
            recorder.lookup(tensor)
            assert before is not None
            if found.storage not in copies:
                copies[found.storage] = _clone(
                    whole_storage(before.untyped_storage(), before.dtype), recorder, found.device
                )
            flat = meta_of(copies[found.storage]).view(before.dtype)
            view = flat.as_strided(before.size(), before.stride(), before.storage_offset())
            copied, real = make_recorded_tensor(view, found.device), None
        meta = meta_of(copied)
        record = recorded(copied)
        assert record is not None
        if isinstance(tensor, RecordedTensor):
            tensor._meta = meta
            follow_meta(tensor)
        else:
            become_recorded(tensor, meta, tensor.device)
        return _Moved(tensor, real, before, record.storage, recorder.tape.writers[record.storage][0])


def _clone(flat: Tensor, recorder: Recorder, device: torch.device) -> Tensor:
    return recorder.record_op(torch.ops.aten.clone.default, (make_recorded_tensor(flat, device),), {})  # type: ignore[no-any-return]


def _left_behind(model: nn.Module, moved: Iterable[_Moved], tape: Tape) -> dict[str, TensorRef]:
    """Return by name the values on the tape that load code has left in the model."""
    own = {id(each.tensor): each for each in moved}
    refs: dict[str, TensorRef] = {}
    saved: set[int] = set()  # the storages of parameters and buffers, which come first
    with DisableTorchFunction():
        for name, kind, tensor in named_tensors(model):
            found, before = recorded(tensor), own.get(id(tensor))
            if found is not None and kind != "attribute":
                saved.add(found.storage)
            elif found is not None and before is not None and found.storage in saved:
                continue  # a view of one of those, whose values it sees
            if found is None or found.memory is not None or found.tape is not tape:
                continue
            ref = recorded_ref(tensor, found.storage)
            if before is None:
                if kind != "attribute" or copied_source(tape, ref) is not None:
                    refs[name] = ref
            elif found.storage != before.storage or not is_copy_of(tape, ref, before.copied_by):
                refs[name] = ref  # it was given other data, or written
    return refs


def _move_back(moved: Iterable[_Moved]) -> None:
    """Put tensors back on their storages, but for those that load code has given another shape or dtype."""
    with torch.no_grad(), DisableTorchFunction(), DisableTorchDispatch():
        for tensor, real, meta, _, _ in moved:
            if not isinstance(tensor, RecordedTensor):
                continue
            if meta is not None and _alike(tensor, meta):
                tensor._meta = meta
                follow_meta(tensor)
            elif meta is None and real is not None and _alike(tensor, real):
                become(tensor, real, alone=True)


def _put_back(places: Iterable[tuple[dict[str, Any], str, Tensor]]) -> None:
    """Put the model's own parameters back, for load code that makes parameters only to hand over values."""
    for table, key, original in places:
        tensor = table.get(key)
        if isinstance(tensor, RecordedTensor) and tensor is not original and _alike(tensor, original):
            table[key] = original


def _alike(one: Tensor, other: Tensor) -> bool:
    with DisableTorchFunction():
        return (one.size(), one.dtype) == (other.size(), other.dtype)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module, with copies of its tables: all that is put back if a load fails."""
    return {
        name: value.copy() if type(value) in (dict, OrderedDict, set) and name.startswith("_") else value
        for name, value in vars(module).items()
    }


class RecordedReader(ComputedReader):
    """A checkpoint after load code.

    A tensor that is a copy of one in the checkpoint keeps its key. What was computed has a key of its own: its name.

    Args:
        below: The checkpoint.
        tape: The tape that the load was recorded on.
        refs: Name → the tensor's value on the tape.
    """

    def __init__(self, below: CheckpointReader, tape: Tape, refs: Mapping[str, TensorRef]) -> None:
        self.key_of: dict[str, str] = {}
        """Name → key."""
        self.used: set[str] = set()
        """The keys of the checkpoint that something is loaded from."""
        keys = dict.fromkeys(below.keys())
        values: dict[str, Value] = {}
        for name, ref in refs.items():
            source = copied_source(tape, ref)
            if source is not None and source.reader is below:
                self.key_of[name] = source.key
                self.used.add(source.key)
                continue
            key = name
            while key in keys:
                key += " (converted)"
            values[key] = Value(ref, sources_of(tape, ref))
            self.used.update(values[key].sources)
            self.key_of[name], keys[key] = key, None
        super().__init__(below, tape, values, keys)

    def reading(self, key: str) -> Callable[[Tape], Tensor]:
        """Return what reads the whole tensor, given the tape, which it does not keep alive."""
        value, below = self._values.get(key), self.below
        if value is None:
            return lambda _: read(below, key)
        ref = value.ref
        return lambda tape: Evaluation(tape).region(ref, None)
