"""How far a checkpoint covers a model: all that is loaded, missing, left over, cast, or does not fit, at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fabric_init._text import dtype_name
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.derived import check_nothing_is_undone
from fabric_init.planning.extra_state import extra_states
from fabric_init.planning.matching import Matching, likely_fixes, likely_transpose
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.planning.validation import without_values
from fabric_init.recording.tape import Tape
from fabric_init.reports.rules import describe_rule


@dataclass(frozen=True)
class Amount:
    """A number of tensors, and the bytes that they have in the model."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class Fresh:
    """A tensor that is not loaded. ``rule``: the init that has the last word on it, with ``file:line``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    rule: str


@dataclass(frozen=True)
class Unexpected:
    """A checkpoint key that no tensor of the model has."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Cast:
    """Tensors that get another dtype on their way. ``bytes`` are those in the checkpoint."""

    saved_as: str
    kept_as: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class WrongShape:
    """A tensor whose key has another shape in the checkpoint, or a dtype that no cast takes to the model's."""

    name: str
    key: str
    model_shape: tuple[int, ...]
    checkpoint_shape: tuple[int, ...]
    problem: str


@dataclass(frozen=True)
class Coverage:
    """What of a model a checkpoint brings.

    Attributes:
        wanted: the tensors that ``state_dict`` has: parameters and persistent buffers, ties once.
        loaded: those of them that the checkpoint brings.
        missing: those that it lacks, with the rule that would initialize each.
        reinit: those that are to be initialized afresh although it may have them.
        unexpected: its keys that are left over.
        casts: by pair of dtypes.
        wrong_shapes: what cannot be loaded as it is.
        proposed: renames and conversions under which more would be found, as sentences.
        without_values: tensors that neither the checkpoint nor the model's own code gives a value.
        problems: other reasons why the load would be refused, as sentences.
        complete: whether the load would go through, as it was asked for.
    """

    wanted: Amount
    loaded: Amount
    missing: tuple[Fresh, ...]
    reinit: tuple[Fresh, ...]
    unexpected: tuple[Unexpected, ...]
    casts: tuple[Cast, ...]
    wrong_shapes: tuple[WrongShape, ...]
    proposed: tuple[str, ...]
    without_values: tuple[str, ...]
    problems: tuple[str, ...]
    complete: bool


def coverage_of(
    found: Matching,
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    wanted: LoadOptions,
    problems: Sequence[str] = (),
) -> Coverage:
    """All that loading would raise, and what it would do, from how model and checkpoint meet.

    Args:
        found: how they meet.
        tapes: the tape of each recorded storage.
        reader: the checkpoint, of which only the header is asked; ``None`` to initialize everything.
        wanted: what was asked of the load.
        problems: what else is against it.
    """
    misfits = {misfit.slot.name for misfit in found.misfits}
    missing = {slot.name for slot in found.missing}
    saved = [entry for entry in found.entries if entry.slot.saved]
    loaded = [entry for entry in saved if entry.action is Action.LOAD and entry.slot.name not in misfits]
    afresh = [entry for entry in saved if entry.action is not Action.LOAD]
    without = [name for names in without_values(found.entries, tapes) for name in names]
    problems = [*problems, *_undone(found.entries, tapes)]
    nothing_matches = found.lacks_some and not found.taken
    mismatch = wanted.strict and (found.lacks_some or bool(found.unexpected))
    return Coverage(
        wanted=_amount(saved),
        loaded=_amount(loaded),
        missing=(
            *_fresh((entry for entry in afresh if entry.slot.name in missing), tapes),
            *(Fresh(name, (), "extra state", 0, "stays as it was built") for name in found.missing_extras),
        ),
        reinit=_fresh((entry for entry in afresh if entry.slot.name not in missing), tapes) if reader else (),
        unexpected=() if reader is None else tuple(_left_over(key, reader) for key in found.unexpected),
        casts=_casts(loaded),
        wrong_shapes=tuple(
            WrongShape(slot.name, key, tuple(slot.shape), tuple(spec.shape), problem)
            for slot, key, spec, problem in found.misfits
        ),
        proposed=() if reader is None else _proposed(found, reader),
        without_values=tuple(without),
        problems=tuple(problems),
        complete=not (mismatch or nothing_matches or misfits or without or problems),
    )


def _amount(entries: Sequence[PlanEntry]) -> Amount:
    return Amount(len(entries), sum(bytes_of(entry.slot) for entry in entries))


def bytes_of(slot: TensorInfo) -> int:
    """Of the whole tensor, as the model keeps it."""
    return slot.shape.numel() * slot.dtype.itemsize


def _fresh(entries: Iterable[PlanEntry], tapes: Mapping[int, Tape]) -> tuple[Fresh, ...]:
    found = []
    for slot, *_ in entries:
        rule = "" if slot.ref is None else describe_rule(tapes[slot.ref.storage], slot.ref)
        found.append(Fresh(slot.name, tuple(slot.shape), dtype_name(slot.dtype), bytes_of(slot), rule))
    return tuple(found)


def _left_over(key: str, reader: CheckpointReader) -> Unexpected:
    if key in extra_states(reader):
        return Unexpected(key, (), "extra state", 0)
    spec = reader.spec(key)
    return Unexpected(key, tuple(spec.shape), dtype_name(spec.dtype), math.prod(spec.shape) * spec.dtype.itemsize)


def _casts(entries: Sequence[PlanEntry]) -> tuple[Cast, ...]:
    found: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in entries:
        if entry.cast_from is not None:
            nbytes = entry.slot.shape.numel() * entry.cast_from.itemsize
            found[dtype_name(entry.cast_from), dtype_name(entry.slot.dtype)].append(nbytes)
    return tuple(Cast(*dtypes, len(sizes), sum(sizes)) for dtypes, sizes in found.items())


def _proposed(found: Matching, reader: CheckpointReader) -> tuple[str, ...]:
    transpose = likely_transpose(found, reader) if found.misfits else None
    fixes = likely_fixes(found, reader) if found.lacks_some and found.unexpected else []
    return (*fixes, *([transpose] if transpose is not None else []))


def _undone(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> list[str]:
    try:
        check_nothing_is_undone(entries, tapes)
    except CheckpointMismatchError as error:
        return [str(error)]
    return []
