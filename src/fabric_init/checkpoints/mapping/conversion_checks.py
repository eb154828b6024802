"""What conversions check: their own arguments when they are written, and the checkpoint when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fabric_init.checkpoints.mapping.key_pattern import KeyPattern, Match
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.errors import CheckpointMismatchError

Specs = Mapping[str, TensorSpec]


# -- wrong declarations ------------------------------------------------------------------------------------------------


def listed(of: object, what: str, names: Sequence[str]) -> Sequence[str]:
    """``names``, if it is a list of different ones. Raises ``ValueError``, as the next two do."""
    if isinstance(names, str) or not names:
        raise ValueError(f"{type(of).__name__}: {what} should be a list of names, not {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{type(of).__name__}: {what} has a name twice: {list(names)}")
    return names


def check_blanks(of: object, sources: Sequence[str], into: Sequence[str], more: int = 0) -> None:
    """Every name is one, all on a side have as many ``{}``, and ``into`` has ``more`` of them than the sources."""
    old = [KeyPattern(name).blanks for name in sources]
    new = [KeyPattern(name).blanks for name in into]
    if len(set(old)) > 1 or any(count != old[0] + more for count in new):
        expected = {0: "as many {} in each name", 1: "one {} more in into", -1: "one {} less in into"}[more]
        raise ValueError(f"{of}: there should be {expected}")


def check_groups(of: object, groups: int) -> None:
    """There is at least one group."""
    if groups < 1:
        raise ValueError(f"{of}: groups={groups} should be 1 or more")


# -- checkpoints that are not as declared ------------------------------------------------------------------------------


def matching(specs: Specs, name: str) -> list[tuple[str, Match]]:
    """Keys that ``name`` stands for, with what is around it.

    Raises :class:`~fabric_init.errors.CheckpointMismatchError` when there is none, as the next three do when shapes or
    dtypes do not fit.
    """
    pattern = KeyPattern(name)
    found = [(key, match) for key in specs if (match := pattern.match(key)) is not None]
    if not found:
        depth = name.count(".") + 1
        ends = {".".join("{}" if part.isdecimal() else part for part in key.split(".")[-depth:]) for key in specs}
        close = get_close_matches(name, sorted(ends)[:10_000], n=3)
        hint = f"; there is {', '.join(map(repr, close))}" if close else ""
        raise CheckpointMismatchError(f"no key ends in {name!r}{hint}")
    return found


def dimension(key: str, spec: TensorSpec, dim: int) -> int:
    """``dim``, counted from the front."""
    if not -len(spec.shape) <= dim < len(spec.shape):
        raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: it has no dimension {dim}")
    return dim % len(spec.shape)


def share(key: str, spec: TensorSpec, size: int, groups: int) -> int:
    """How much of ``size`` is in each group."""
    if size % groups:
        raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: a size of {size} cannot be in {groups} equal groups")
    return size // groups


def check_alike(key: str, spec: TensorSpec, other: str, other_spec: TensorSpec, but_for: int | None = None) -> None:
    """Both have one dtype and one shape, but for one dimension."""
    one, two = list(spec.shape), list(other_spec.shape)
    if but_for is not None and but_for < len(two):
        one[but_for] = two[but_for] = 0
    if one != two:
        raise CheckpointMismatchError(
            f"{key} is {shape_of(spec)} and {other} is {shape_of(other_spec)}: they cannot be put together"
        )
    if spec.dtype != other_spec.dtype:
        raise CheckpointMismatchError(f"{key} is {spec.dtype} and {other} is {other_spec.dtype}: they should be alike")


def shape_of(spec: TensorSpec) -> str:
    """For messages."""
    return str(tuple(spec.shape))
