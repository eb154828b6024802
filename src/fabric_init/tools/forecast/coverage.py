"""How far a checkpoint covers a model: tensors loaded, missing, unexpected, cast, or of a wrong shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fabric_init._text import dtype_name
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.checks.undone_changes import check_nothing_is_undone
from fabric_init.planning.checks.validation import refusal_of, without_values
from fabric_init.planning.hints.proposals import likely_fixes, likely_transpose
from fabric_init.planning.hints.quantized import quantized_message, unscaled
from fabric_init.planning.hints.strict_false_mistakes import hidden_mistake
from fabric_init.planning.matching import Matching
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.provenance import describe_rule


@dataclass(frozen=True)
class Amount:
    """A number of tensors, and their bytes in the model."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class Fresh:
    """A tensor that is not loaded. ``rule``: the init rule that determines its value, with ``file:line``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    rule: str


@dataclass(frozen=True)
class Unexpected:
    """A checkpoint key without a tensor in the model."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Cast:
    """Tensors that are cast while they are loaded. ``bytes`` are those in the checkpoint."""

    saved_as: str
    kept_as: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class WrongShape:
    """A tensor with another shape in the checkpoint, or a dtype that cannot be cast to that of the model."""

    name: str
    key: str
    model_shape: tuple[int, ...]
    checkpoint_shape: tuple[int, ...]
    problem: str


@dataclass(frozen=True)
class Coverage:
    """How far a checkpoint covers a model.

    Attributes:
        wanted: the tensors of ``state_dict``: parameters and persistent buffers, tied ones once.
        loaded: those that are loaded.
        missing: those that the checkpoint lacks, with the rule that initializes each.
        reinit: those that are initialized although the checkpoint may have them.
        unexpected: checkpoint keys without a tensor.
        casts: by pair of dtypes.
        wrong_shapes: tensors that cannot be loaded because of their shape or dtype.
        proposed: renames and conversions that would load more, as sentences.
        without_values: tensors that neither the checkpoint nor the model's own code initializes.
        problems: other reasons why the load would raise, as sentences.
        complete: whether the load would succeed with these options.
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
    matching: Matching,
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    wanted: LoadOptions,
    problems: Sequence[str] = (),
) -> Coverage:
    """Return what loading would do, and every reason why it would raise.

    Args:
        matching: the matching of model and checkpoint.
        tapes: the tape of each recorded storage.
        reader: the checkpoint, of which only the header is read; ``None`` to initialize everything.
        wanted: the options of the load.
        problems: further reasons.
    """
    misfits = {misfit.slot.name for misfit in matching.misfits}
    missing = {slot.name for slot in matching.missing}
    saved = [entry for entry in matching.entries if entry.slot.saved]
    loaded = [entry for entry in saved if entry.action is Action.LOAD and entry.slot.name not in misfits]
    afresh = [entry for entry in saved if entry.action is not Action.LOAD]
    without = [name for names in without_values(matching.entries, tapes) for name in names]
    problems = [*problems, *_undone(matching.entries, tapes)]
    nothing_matches = matching.lacks_some and not matching.taken
    refused = reader is not None and refusal_of(matching, reader) is not None
    if reader is not None and refused:
        quantized = unscaled(matching, reader)
        hidden = None if wanted.strict or nothing_matches else hidden_mistake(matching, reader)
        problems = [
            *problems,
            *([quantized_message(quantized, matching, reader)] if quantized else [hidden] if hidden else []),
        ]
    return Coverage(
        wanted=_amount(saved),
        loaded=_amount(loaded),
        missing=(
            *_fresh((entry for entry in afresh if entry.slot.name in missing), tapes),
            *(Fresh(name, (), "extra state", 0, "stays as it was built") for name in matching.missing_extras),
        ),
        reinit=_fresh((entry for entry in afresh if entry.slot.name not in missing), tapes) if reader else (),
        unexpected=() if reader is None else tuple(_left_over(key, reader) for key in matching.unexpected),
        casts=_casts(loaded),
        wrong_shapes=tuple(
            WrongShape(slot.name, key, tuple(slot.shape), tuple(spec.shape), problem)
            for slot, key, spec, problem in matching.misfits
        ),
        proposed=() if reader is None else _proposed(matching, reader),
        without_values=tuple(without),
        problems=tuple(problems),
        complete=not (refused or without or problems),
    )


def _amount(entries: Sequence[PlanEntry]) -> Amount:
    return Amount(len(entries), sum(bytes_of(entry.slot) for entry in entries))


def bytes_of(slot: TensorInfo) -> int:
    """Return the bytes of the full tensor, as the model keeps it."""
    return slot.shape.numel() * slot.dtype.itemsize


def _fresh(entries: Iterable[PlanEntry], tapes: Mapping[int, Tape]) -> tuple[Fresh, ...]:
    result = []
    for slot, *_ in entries:
        rule = "" if slot.ref is None else describe_rule(tapes[slot.ref.storage], slot.ref)
        result.append(Fresh(slot.name, tuple(slot.shape), dtype_name(slot.dtype), bytes_of(slot), rule))
    return tuple(result)


def _left_over(key: str, reader: CheckpointReader) -> Unexpected:
    if key in reader.extra_state:
        return Unexpected(key, (), "extra state", 0)
    spec = reader.spec(key)
    return Unexpected(key, tuple(spec.shape), dtype_name(spec.dtype), math.prod(spec.shape) * spec.dtype.itemsize)


def _casts(entries: Sequence[PlanEntry]) -> tuple[Cast, ...]:
    result: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for entry in entries:
        if entry.cast_from is not None:
            nbytes = entry.slot.shape.numel() * entry.cast_from.itemsize
            result[dtype_name(entry.cast_from), dtype_name(entry.slot.dtype)].append(nbytes)
    return tuple(Cast(*dtypes, len(sizes), sum(sizes)) for dtypes, sizes in result.items())


def _proposed(matching: Matching, reader: CheckpointReader) -> tuple[str, ...]:
    transpose = likely_transpose(matching, reader) if matching.misfits else None
    fixes = likely_fixes(matching, reader) if matching.lacks_some and matching.unexpected else []
    return (*fixes, *([transpose.text] if transpose is not None else []))


def _undone(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> list[str]:
    try:
        check_nothing_is_undone(entries, tapes)
    except CheckpointMismatchError as error:
        return [str(error)]
    return []
