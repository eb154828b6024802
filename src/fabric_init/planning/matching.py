"""Match a model's tensors with a checkpoint's keys, and suggest what would make more of them match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from fabric_init.checkpoints import CheckpointReader, TensorSpec, rename_keys
from fabric_init.checkpoints.state_dicts import EXTRA_STATE
from fabric_init.errors import OptionError
from fabric_init.planning.hints.adapters import likely_adapters
from fabric_init.planning.hints.conversions import likely_conversions, likely_transposes
from fabric_init.planning.hints.renames import likely_part, likely_renames, renamed_as_suggested
from fabric_init.planning.loading.recorded_load import RecordedLoad
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.liveness import never_written
from fabric_init.recording.tape import Tape


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
    """Match tensors and keys. Arguments are those of :func:`~fabric_init.planning.validation.make_plan`.

    Raises:
        CheckpointMismatchError: ``rename`` gives two keys the same name, or selects a part that is not there.
        OptionError: ``rename`` is invalid, or ``reinit`` matches no tensor, or one of several that are tied.
    """
    keys = rename_keys((*reader.keys(), *reader.extra_state), options.rename) if reader is not None else {}
    key_of = {name: key for key, name in keys.items()}
    if load is not None:  # what load code has loaded under which name, and what it misses, is as it says
        keys = {key: name for key, name in keys.items() if key not in load.key_of.values()} | {
            key: name for name, key in load.key_of.items()
        }
        key_of = {name: key for name, key in key_of.items() if name.endswith(EXTRA_STATE)} | dict(load.key_of)
    _check_reinit(slots, options.reinit)

    entries: list[PlanEntry] = []
    missing: list[TensorInfo] = []
    misfits: list[Mismatch] = []
    taken: set[str] = set()
    loadable = 0
    for slot in slots:
        names = [name for name in slot.names if name in key_of] if slot.saved or load is not None else []
        fresh = bool(options.reinit) and any(fnmatchcase(n, glob) for glob in options.reinit for n in slot.names)
        taken.update(key_of[name] for name in names)
        loadable += bool(names)
        if names and not fresh:
            assert reader is not None
            slot_keys = tuple(key_of[name] for name in names)
            specs = [reader.spec(key) for key in slot_keys]
            misfits.extend(
                Mismatch(slot, key, spec, problem)
                for key, spec in zip(slot_keys, specs, strict=True)
                if (problem := _mismatch(slot, key, spec)) is not None
            )
            entries.append(PlanEntry(slot, Action.LOAD, slot_keys, specs[0]))
            continue
        lacks = load is None or load.outcome.missing is None or not load.outcome.missing.isdisjoint(slot.names)
        if reader is not None and slot.saved and not fresh and lacks:
            missing.append(slot)
        entries.append(PlanEntry(slot, own_init(slot, tapes)))
    missing_extras = []
    if load is not None:
        taken.update(
            key for key, name in keys.items() if name.endswith(EXTRA_STATE) and name not in load.outcome.unexpected
        )
        missing_extras = sorted(name for name in load.outcome.missing or () if name.endswith(EXTRA_STATE))
    unexpected = [key for key in keys if key not in taken]
    if load is not None:
        renamed = [name for name in load.outcome.unexpected if name not in keys.values()]
        unexpected = [*(key for key in unexpected if keys[key] in load.outcome.unexpected), *renamed]
    return Matching(
        entries=tuple(entries),
        names=keys,
        taken=frozenset(taken),
        loadable=loadable,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        misfits=tuple(misfits),
        missing_extras=tuple(missing_extras),
    )


def own_init(slot: TensorInfo, tapes: Mapping[int, Tape]) -> Action:
    """Return the action for a tensor that is not loaded."""
    if slot.real:
        return Action.KEEP
    if slot.ref is not None and not slot.saved and never_written(tapes[slot.ref.storage], slot.ref):
        return Action.SCRATCH  # a scratch buffer, which the model's own code writes when it needs it
    return Action.INIT


def _mismatch(slot: TensorInfo, key: str, spec: TensorSpec) -> str | None:
    name = slot.name if key in slot.names else f"{slot.name} (checkpoint key {key})"
    made = f", {spec.made}" if spec.made else ""
    if spec.shape != slot.shape:
        return f"{name} is {tuple(slot.shape)} in the model and {tuple(spec.shape)} in the checkpoint{made}"
    if _number_kind(spec.dtype) != _number_kind(slot.dtype):
        return f"{name} is {slot.dtype} in the model and {spec.dtype} in the checkpoint, and no cast keeps its meaning"
    return None


def _number_kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "int"


def _check_reinit(slots: Sequence[TensorInfo], patterns: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for slot in slots for name in slot.names):
            raise OptionError(
                f"reinit={pattern!r} names no tensor of the model; names look like {slots[0].name!r}"
                if slots
                else f"reinit={pattern!r}: the model has no tensors"
            )
    for slot in slots if patterns else ():
        fresh = [name for name in slot.names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        others = [name for name in slot.names if name not in fresh]
        if fresh and others:
            raise OptionError(
                f"reinit names {', '.join(fresh)}, which is tied to {', '.join(others)}: they are one tensor. "
                f"Untie them in the model to give one of them new values, or name all: reinit={[*fresh, *others]}."
            )


def likely_fixes(matching: Matching, reader: CheckpointReader) -> list[str]:
    """Return suggestions, each with a rename or conversion under which missing tensors would match."""
    missing = {slot.name: slot.shape for slot in matching.missing} | dict.fromkeys(
        matching.missing_extras, torch.Size()
    )
    offered = {
        matching.names[key]: _shape_of(key, matching.names[key], reader)
        for key in matching.unexpected
        if key in matching.names
    }
    adapters = likely_adapters(missing, offered, [name for entry in matching.entries for name in entry.slot.names])
    if adapters is not None:
        return [adapters]
    renames = likely_renames(missing, offered)
    wanting, offered = renamed_as_suggested(renames, missing, offered)
    return [*map(str, renames), *likely_part(renames, wanting, offered), *likely_conversions(wanting, offered)]


def _shape_of(key: str, name: str, reader: CheckpointReader) -> torch.Size:
    """Return the shape to match by; extra state has none, since modules take it in any shape."""
    extra = key in reader.extra_state or name.endswith(EXTRA_STATE)
    return torch.Size() if extra else reader.spec(key).shape


def likely_transpose(matching: Matching, reader: CheckpointReader) -> str | None:
    """Return the conversion under which tensors of a wrong shape would fit, in words; ``None`` if there is none."""
    if likely_transposes({misfit.key: (misfit.slot.shape, misfit.spec.shape) for misfit in matching.misfits}) is None:
        return None
    # Square tensors beside them are transposed as well, though their shapes match.
    shapes = {key: (slot.shape, reader.spec(key).shape) for slot, _, keys, *_ in matching.entries for key in keys}
    return f"convert=[{likely_transposes(shapes)}], in the names of the checkpoint."
