"""Who gets what: a pure function of the model's tensors, the tape and the checkpoint's header.

Every error a user can make is raised here, before a weight is read or memory is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from fabric_init.checkpoints import CheckpointReader, TensorSpec, likely_renames, rename_keys
from fabric_init.checkpoints.likely_adapters import likely_adapters
from fabric_init.checkpoints.likely_conversions import likely_conversions, likely_transposes
from fabric_init.checkpoints.likely_renames import likely_part, renamed_as_suggested
from fabric_init.checkpoints.renaming import Rename
from fabric_init.errors import CheckpointMismatchError, UninitializedTensorError
from fabric_init.filling.extra_state import Extra, ExtraSlot, extra_states
from fabric_init.filling.slots import Slot
from fabric_init.recording.tape import Tape, TensorRef

_MOST_NAMES = 40


class Action(Enum):
    """Where a tensor's value comes from."""

    LOAD = "loaded"
    INIT = "initialised"
    KEEP = "set when built"
    SCRATCH = "scratch"


class Entry(NamedTuple):
    """One tensor's part of the plan. ``keys`` are the checkpoint keys that hold it: several where ties were saved."""

    slot: Slot
    action: Action
    keys: tuple[str, ...] = ()
    spec: TensorSpec | None = None
    since: int | None = None
    """Ops recorded after this number are later than the load: a block had ended, the next one was open."""

    @property
    def cast_from(self) -> torch.dtype | None:
        return self.spec.dtype if self.spec is not None and self.spec.dtype != self.slot.dtype else None


class Given(NamedTuple):
    """A tensor that is all of its recorded storage, the checkpoint key for its value, and :attr:`Entry.since`."""

    ref: TensorRef
    key: str
    since: int | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`~fabric_init.filling.fill.fill` carries out. ``unexpected``: checkpoint keys that nothing takes."""

    entries: tuple[Entry, ...]
    unexpected: tuple[str, ...] = ()
    extras: tuple[Extra, ...] = field(default=(), compare=False)
    sources: Mapping[int, Given] = field(default_factory=dict)
    """By storage: what the model does not hold any more, but others may have been computed from."""


@dataclass(frozen=True)
class Wanted:
    """What the user asked of a load."""

    strict: bool = True
    rename: Rename = None
    reinit: Sequence[str] = ()


def make_plan(
    slots: Sequence[Slot],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    wanted: Wanted,
    extra_slots: Sequence[ExtraSlot] = (),
) -> Plan:
    """Decide for each tensor: load this key, run the model's own init, or keep what it has.

    Args:
        slots: the model's tensors.
        tapes: the tape of each recorded storage among them.
        reader: the checkpoint, of which only the header is asked; ``None`` to initialise everything.
        wanted: ``strict``, ``rename`` and ``reinit``.
        extra_slots: the model's modules that take extra state.

    Raises:
        CheckpointMismatchError: missing, unexpected or mismatched keys.
        UninitializedTensorError: a tensor that neither the checkpoint nor the model's own code gives a value.
    """
    found = match(slots, tapes, reader, wanted, extra_slots)
    if reader is not None:
        if found.lacks_some or found.unexpected:
            nothing_matches = found.lacks_some and not found.taken
            if wanted.strict or nothing_matches:
                raise CheckpointMismatchError(_keys_message(found, reader))
        if found.misfits:
            transpose = likely_transpose(found, reader)
            raise CheckpointMismatchError(
                f"{reader.path}: {len(found.misfits)} of {found.loadable} tensors do not fit the model:\n"
                + _listed([misfit.problem for misfit in found.misfits])
                + ("" if transpose is None else f"\nLikely: {transpose}")
                + "\nBuild the model from the checkpoint's own config, or name what is to be initialised afresh "
                'instead, e.g. reinit=["' + found.misfits[0].slot.name + '"].'
            )
    check_all_have_values(found.entries, tapes, reader)
    return Plan(found.entries, found.unexpected, found.extras)


class Misfit(NamedTuple):
    """A tensor whose checkpoint key has another shape, or a dtype that cannot become the model's; in words."""

    slot: Slot
    key: str
    spec: TensorSpec
    problem: str


class Matching(NamedTuple):
    """How the tensors of a model and the keys of a checkpoint meet, before it is judged."""

    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    """Checkpoint key → tensor name, as renamed."""
    taken: frozenset[str]
    """The keys that a tensor has, also where it is to be initialised afresh."""
    loadable: int
    """How many tensors have a key."""
    missing: tuple[Slot, ...]
    unexpected: tuple[str, ...]
    misfits: tuple[Misfit, ...]
    extras: tuple[Extra, ...] = ()
    missing_extras: tuple[str, ...] = ()
    """Names of extra state that modules take and the checkpoint has not."""

    @property
    def lacks_some(self) -> bool:
        """Whether the checkpoint lacks something that the model takes."""
        return bool(self.missing or self.missing_extras)


def match(
    slots: Sequence[Slot],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    wanted: Wanted,
    extra_slots: Sequence[ExtraSlot] = (),
) -> Matching:
    """What :func:`make_plan` judges. Arguments as there.

    Raises:
        CheckpointMismatchError: ``rename`` or ``reinit`` is not usable.
    """
    keys = rename_keys((*reader.keys(), *extra_states(reader)), wanted.rename) if reader is not None else {}
    key_of = {name: key for key, name in keys.items()}
    _check_reinit(slots, wanted.reinit)

    entries: list[Entry] = []
    missing: list[Slot] = []
    misfits: list[Misfit] = []
    taken: set[str] = set()
    loadable = 0
    for slot in slots:
        names = [name for name in slot.names if name in key_of] if slot.saved else []
        fresh = bool(wanted.reinit) and any(fnmatchcase(n, glob) for glob in wanted.reinit for n in slot.names)
        taken.update(key_of[name] for name in names)
        loadable += bool(names)
        if names and not fresh:
            assert reader is not None
            found = tuple(key_of[name] for name in names)
            specs = [reader.spec(key) for key in found]
            misfits.extend(
                Misfit(slot, key, spec, problem)
                for key, spec in zip(found, specs, strict=True)
                if (problem := _mismatch(slot, key, spec)) is not None
            )
            entries.append(Entry(slot, Action.LOAD, found, specs[0]))
            continue
        if reader is not None and slot.saved and not fresh:
            missing.append(slot)
        entries.append(Entry(slot, own_init(slot, tapes)))
    extras: list[Extra] = []
    missing_extras: list[str] = []
    for extra in extra_slots if reader is not None else ():
        assert reader is not None
        under = [key_of[name] for name in extra.names if name in key_of]
        taken.update(under)
        extras += [Extra(extra.module, key, reader) for key in under[:1]]
        missing_extras += extra.names[: not under]
    return Matching(
        entries=tuple(entries),
        names=keys,
        taken=frozenset(taken),
        loadable=loadable,
        missing=tuple(missing),
        unexpected=tuple(key for key in keys if key not in taken),
        misfits=tuple(misfits),
        extras=tuple(extras),
        missing_extras=tuple(missing_extras),
    )


def own_init(slot: Slot, tapes: Mapping[int, Tape]) -> Action:
    """What becomes of a tensor that nothing is loaded into."""
    if slot.real:
        return Action.KEEP
    if slot.ref is not None and not slot.saved and tapes[slot.ref.storage].never_written(slot.ref):
        return Action.SCRATCH  # room that the model's own code fills when it needs it
    return Action.INIT


def _mismatch(slot: Slot, key: str, spec: TensorSpec) -> str | None:
    named = slot.name if key in slot.names else f"{slot.name} (checkpoint key {key})"
    made = f", {spec.made}" if spec.made else ""
    if spec.shape != slot.shape:
        return f"{named} is {tuple(slot.shape)} in the model and {tuple(spec.shape)} in the checkpoint{made}"
    if _number_kind(spec.dtype) != _number_kind(slot.dtype):
        return f"{named} is {slot.dtype} in the model and {spec.dtype} in the checkpoint, and no cast keeps its meaning"
    return None


def _number_kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "int"


def _check_reinit(slots: Sequence[Slot], patterns: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise CheckpointMismatchError(f"reinit takes a list of globs, not one string: reinit=[{patterns!r}]")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for slot in slots for name in slot.names):
            raise CheckpointMismatchError(
                f"reinit={pattern!r} names no tensor of the model; names look like {slots[0].name!r}"
                if slots
                else f"reinit={pattern!r}: the model has no tensors"
            )


def without_values(entries: Sequence[Entry], tapes: Mapping[int, Tape]) -> tuple[list[str], list[str]]:
    """Names of tensors to initialise for which there is no init: not recorded at all; never written by the model."""
    outside, garbage = [], []
    for slot, action, *_ in entries:
        if action is Action.INIT:
            if slot.ref is None:
                outside.append(slot.name)
            elif tapes[slot.ref.storage].never_written(slot.ref):
                garbage.append(slot.name)
    return outside, garbage


def check_all_have_values(entries: Sequence[Entry], tapes: Mapping[int, Tape], reader: CheckpointReader | None) -> None:
    """Raise if neither a checkpoint nor the model's own code gives some tensor a value.

    Raises:
        UninitializedTensorError: naming all of them.
    """
    outside, garbage = without_values(entries, tapes)
    if not outside and not garbage:
        return
    parts = []
    if garbage:
        parts.append(
            f"the model's own code never gives {len(garbage)} tensors a value (torch.empty and no init), so they would "
            "be garbage:\n" + _listed(garbage)
        )
    if outside:
        parts.append(
            f"{len(outside)} tensors are on the meta device but were not recorded, so there is no init to run:\n"
            + _listed(outside)
        )
    where = f"{reader.path} does not hold them" if reader is not None else "no checkpoint brings them"
    raise UninitializedTensorError(
        "; ".join(parts) + f"\nand {where}. Initialise them in the model's constructor (inside the block), or load a "
        "checkpoint that has them."
    )


def _keys_message(found: Matching, reader: CheckpointReader) -> str:
    saved = sum(entry.slot.saved for entry in found.entries)
    lines = [f"{reader.path}: {found.loadable} of {saved} tensors match."]
    if reader.note:
        lines.append(f"({reader.note}.)")
    if found.lacks_some:
        names = [*(slot.name for slot in found.missing), *found.missing_extras]
        lines.append(f"Missing from the checkpoint ({len(names)}):\n" + _listed(names))
    if found.unexpected:
        lines.append(f"Not in the model ({len(found.unexpected)}):\n" + _listed(found.unexpected))
    hints = likely_mends(found, reader)
    lines += [f"Likely: {hint}" for hint in hints]
    if not hints:
        if not found.loadable:
            lines.append("This looks like a checkpoint of another model.")
        else:
            lines.append(
                "strict=False gives missing tensors the model's own init and ignores the rest; rename= maps keys."
            )
    return "\n".join(lines)


def likely_mends(found: Matching, reader: CheckpointReader) -> list[str]:
    """Sentences, each with a rename or conversion under which missing tensors would be found."""
    missing = {slot.name: slot.shape for slot in found.missing} | dict.fromkeys(found.missing_extras, torch.Size())
    no_tensors = extra_states(reader).keys()
    offered = {found.names[key]: reader.spec(key).shape for key in found.unexpected if key not in no_tensors}
    adapters = likely_adapters(missing, offered, [name for entry in found.entries for name in entry.slot.names])
    if adapters is not None:
        return [adapters]
    renames = likely_renames(missing, offered)
    wanting, offered = renamed_as_suggested(renames, missing, offered)
    return [*map(str, renames), *likely_part(renames, wanting, offered), *likely_conversions(wanting, offered)]


def likely_transpose(found: Matching, reader: CheckpointReader) -> str | None:
    """The conversion under which tensors that do not fit would, in words; ``None`` for nothing."""
    if likely_transposes({misfit.key: (misfit.slot.shape, misfit.spec.shape) for misfit in found.misfits}) is None:
        return None
    # square ones beside them lie the other way round, too, and fit all the same
    shapes = {key: (slot.shape, reader.spec(key).shape) for slot, _, keys, *_ in found.entries for key in keys}
    return f"convert=[{likely_transposes(shapes)}], in the names of the checkpoint."


def _listed(names: Sequence[str]) -> str:
    return "\n".join(f"  {name}" for name in names)


def storage_groups(entries: Sequence[Entry]) -> dict[int, list[int]]:
    """Which entries lie on the same recorded storage: storage number → positions in ``entries``."""
    groups: dict[int, list[int]] = {}
    for position, entry in enumerate(entries):
        ref: TensorRef | None = entry.slot.ref
        if ref is not None:
            groups.setdefault(ref.storage, []).append(position)
    return groups
