"""Checks of conversions: of their arguments when they are declared, of the checkpoint when it is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fabric_init.checkpoints.mapping.key_pattern import KeyPattern, Match
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.errors import CheckpointMismatchError

Specs = Mapping[str, TensorSpec]


# -- wrong declarations ------------------------------------------------------------------------------------------------


def listed(of: object, what: str, names: Sequence[str]) -> Sequence[str]:
    """Return ``names``. Raise ``ValueError``, as the next two do, unless they are a list without duplicates."""
    if isinstance(names, str) or not names:
        raise ValueError(f"{type(of).__name__}: {what} should be a list of names, not {names!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{type(of).__name__}: {what} has a name twice: {list(names)}")
    return names


def check_blanks(of: object, sources: Sequence[str], into: Sequence[str], more: int = 0) -> None:
    """Require valid names, as many ``{}`` in each of a side, and ``more`` of them in ``into`` than in the sources."""
    old = [KeyPattern(name).blanks for name in sources]
    new = [KeyPattern(name).blanks for name in into]
    if len(set(old)) > 1 or any(count != old[0] + more for count in new):
        expected = {0: "as many {} in each name", 1: "one {} more in into", -1: "one {} less in into"}[more]
        raise ValueError(f"{of}: there should be {expected}")


def check_groups(of: object, groups: int) -> None:
    """Require at least one group."""
    if groups < 1:
        raise ValueError(f"{of}: groups={groups} should be 1 or more")


# -- checkpoints that are not as declared ------------------------------------------------------------------------------


def matching(specs: Specs, name: str) -> list[tuple[str, Match]]:
    """Return the keys that ``name`` matches, with their matches.

    Raises:
        CheckpointMismatchError: there is none. The next three functions raise it when shapes or dtypes do not fit.
    """
    pattern = KeyPattern(name)
    matches = [(key, match) for key in specs if (match := pattern.match(key)) is not None]
    if not matches:
        depth = name.count(".") + 1
        ends = {".".join("{}" if part.isdecimal() else part for part in key.split(".")[-depth:]) for key in specs}
        close = get_close_matches(name, sorted(ends)[:10_000], n=3)
        hint = f"; there is {', '.join(map(repr, close))}" if close else ""
        raise CheckpointMismatchError(f"no key ends in {name!r}{hint}")
    return matches


def dimension(key: str, spec: TensorSpec, dim: int) -> int:
    """Return ``dim``, counted from the front."""
    if not -len(spec.shape) <= dim < len(spec.shape):
        raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: it has no dimension {dim}")
    return dim % len(spec.shape)


def check_shares(key: str, spec: TensorSpec, sizes: Sequence[int], groups: int) -> None:
    """Require that each of ``sizes`` is a multiple of ``groups``."""
    for size in sizes:
        if size % groups:
            raise CheckpointMismatchError(
                f"{key} is {shape_of(spec)}: a size of {size} cannot be in {groups} equal groups"
            )


def check_alike(key: str, spec: TensorSpec, other: str, other_spec: TensorSpec, but_for: int | None = None) -> None:
    """Require the same dtype and the same shape, but for one dimension."""
    shape, other_shape = list(spec.shape), list(other_spec.shape)
    if but_for is not None and but_for < len(other_shape):
        shape[but_for] = other_shape[but_for] = 0
    if shape != other_shape:
        raise CheckpointMismatchError(
            f"{key} is {shape_of(spec)} and {other} is {shape_of(other_spec)}: they cannot be put together"
        )
    if spec.dtype != other_spec.dtype:
        raise CheckpointMismatchError(f"{key} is {spec.dtype} and {other} is {other_spec.dtype}: they should be alike")


def shape_of(spec: TensorSpec) -> str:
    """Return the shape as text, for messages."""
    return str(tuple(spec.shape))
