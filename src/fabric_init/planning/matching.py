"""Match a model's tensors with a checkpoint's keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from fabric_init.checkpoints import CheckpointReader, Conversion, Dequantize, TensorSpec, rename_keys
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.rank_loads import takes_element
from fabric_init.planning.recorded_load.converted import converted
from fabric_init.planning.recorded_load.record import RecordedLoad
from fabric_init.planning.reinit import check_reinit, is_reinitialized
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.liveness import never_written
from fabric_init.recording.tape.tape import Tape


class Mismatch(NamedTuple):
    """A tensor whose checkpoint key has another shape, or a dtype that cannot be cast to the model's."""

    slot: TensorInfo
    key: str
    spec: TensorSpec
    problem: str


class Matching(NamedTuple):
    """The tensors of a model with the keys of a checkpoint, before validation."""

    entries: tuple[PlanEntry, ...]
    names: Mapping[str, str]
    """Checkpoint key → tensor name, as renamed."""
    taken: frozenset[str]
    """The keys that a tensor matches, including tensors that ``reinit`` initializes afresh."""
    loadable: int
    """The number of tensors that match a key."""
    missing: tuple[TensorInfo, ...]
    unexpected: tuple[str, ...]
    misfits: tuple[Mismatch, ...]
    missing_extras: tuple[str, ...] = ()
    """Names of extra state that modules take but the checkpoint lacks."""
    options: LoadOptions = LoadOptions()
    again: Callable[[Sequence[Conversion | Dequantize], LoadOptions], Matching] | None = None
    """Match the same model after conversions and with other options, to try what an error proposes."""

    @property
    def lacks_some(self) -> bool:
        """Whether the checkpoint lacks something that the model takes."""
        return bool(self.missing or self.missing_extras)


def match(
    slots: Sequence[TensorInfo],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    options: LoadOptions,
    load: RecordedLoad | None = None,
) -> Matching:
    """Match tensors and keys. Arguments are those of :func:`~fabric_init.planning.make_plan.make_plan`.

    Raises:
        CheckpointMismatchError: ``rename`` gives two keys the same name, or selects a part that is not there.
        OptionError: ``rename`` is invalid, or ``reinit`` matches no tensor, or one of several that are tied.
    """
    keys, key_of = _names(reader, options, load)
    check_reinit(slots, options.reinit)

    entries: list[PlanEntry] = []
    missing: list[TensorInfo] = []
    misfits: list[Mismatch] = []
    taken: set[str] = set()
    loadable = 0
    for slot in slots:
        names = [name for name in slot.names if name in key_of] if slot.saved or load is not None else []
        fresh = is_reinitialized(slot.names, options.reinit)
        taken.update(key_of[name] for name in names)
        loadable += bool(names)
        if names and not fresh:
            assert reader is not None
            slot_keys = tuple(key_of[name] for name in names)
            specs = [_spec_for(slot, reader.spec(key)) for key in slot_keys]
            misfits.extend(
                Mismatch(slot, key, spec, problem)
                for key, spec in zip(slot_keys, specs, strict=True)
                if (problem := _mismatch(slot, key, spec)) is not None
            )
            entries.append(PlanEntry(slot, Action.LOAD, slot_keys, specs[0]))
            if load is not None and load.outcome.missing is not None and load.outcome.missing.issuperset(names):
                missing.append(slot)  # load code has changed the model's own value of it
            continue
        lacks = load is None or load.outcome.missing is None or not load.outcome.missing.isdisjoint(slot.names)
        if reader is not None and slot.saved and not fresh and lacks:
            missing.append(slot)
        entries.append(PlanEntry(slot, action_without_checkpoint(slot, tapes)))
    unexpected, missing_extras = _left_over(keys, taken, load)

    def again(conversions: Sequence[Conversion | Dequantize], changed: LoadOptions) -> Matching:
        assert reader is not None
        other = converted(reader if load is None else load.below, conversions)
        new = None if load is None else load.again(other, changed)
        return match(slots, tapes, other if new is None else new.reader, changed, new)

    return Matching(
        entries=tuple(entries),
        names=keys,
        taken=frozenset(taken),
        loadable=loadable,
        missing=tuple(missing),
        unexpected=unexpected,
        misfits=tuple(misfits),
        missing_extras=missing_extras,
        options=options,
        again=again,
    )


def _names(
    reader: CheckpointReader | None, options: LoadOptions, load: RecordedLoad | None
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the tensor name for each checkpoint key, and the key for each name; load code decides for itself."""
    if reader is None:
        return {}, {}
    if load is None:
        keys = rename_keys((*reader.keys(), *reader.extra_state), options.rename)
        return keys, {name: key for key, name in keys.items()}
    loaded = set(load.key_of.values())
    others = {key: name for key, name in load.names.items() if key not in loaded}
    extra_state = {name: key for key, name in load.names.items() if name.endswith(EXTRA_STATE)}
    return others | {key: name for name, key in load.key_of.items()}, extra_state | dict(load.key_of)


def _left_over(
    keys: Mapping[str, str], taken: set[str], load: RecordedLoad | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys that nothing takes, and the names of extra state that load code misses."""
    if load is None:
        return tuple(key for key in keys if key not in taken), ()
    unexpected = load.outcome.unexpected
    taken.update(key for key, name in keys.items() if name.endswith(EXTRA_STATE) and name not in unexpected)
    missing = sorted(name for name in load.outcome.missing or () if name.endswith(EXTRA_STATE))
    return tuple(key for key in keys if key not in taken and keys[key] in unexpected), tuple(missing)


def action_without_checkpoint(slot: TensorInfo, tapes: Mapping[int, Tape]) -> Action:
    """Return the action for a tensor that is not loaded."""
    if slot.real:
        return Action.KEEP
    if slot.ref is not None and not slot.saved and never_written(tapes[slot.ref.storage], slot.ref):
        return Action.SCRATCH  # a scratch buffer, which the model's own code writes when it needs it
    return Action.INIT


def _spec_for(slot: TensorInfo, spec: TensorSpec) -> TensorSpec:
    """Return what a tensor is loaded from: a scalar takes the only element of a tensor with one dimension."""
    if not takes_element(slot.shape, spec.shape):
        return spec
    return replace(spec, shape=slot.shape, made=f"element 0 of (1,){f', {spec.made}' if spec.made else ''}")


def _mismatch(slot: TensorInfo, key: str, spec: TensorSpec) -> str | None:
    name = slot.name if key in slot.names else f"{slot.name} (checkpoint key {key})"
    made = f", {spec.made}" if spec.made else ""
    if spec.shape != slot.shape:
        if not spec.shape and tuple(slot.shape) == (1,):
            made += (
                f": to keep its value, convert={{{key!r}: lambda s: s[{key!r}].view(1)}}, or make it () in the model"
            )
        return f"{name} is {tuple(slot.shape)} in the model and {tuple(spec.shape)} in the checkpoint{made}"
    if spec.dtype != slot.dtype and _number_kind(spec.dtype) != _number_kind(slot.dtype):
        return f"{name} is {slot.dtype} in the model and {spec.dtype} in the checkpoint, and no cast keeps its meaning"
    return None


def _number_kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "int"
