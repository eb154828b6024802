"""Declare how tensors of a checkpoint differ from the model's: joined or split, stacked, transposed.

Keys are named by their ends, see :class:`~fabric_init.checkpoints.mapping.key_pattern.KeyPattern`:
``"qkv_proj.weight"`` stands for that tensor of every layer, whatever comes before, and what comes before is kept.
``{}`` stands for one dotted part that differs, and stands for the same in ``into``.

Wrong arguments are a ``ValueError``; what does not fit the checkpoint is a
:class:`~fabric_init.errors.CheckpointMismatchError` when it is opened, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Protocol

import torch

from fabric_init.checkpoints.mapping.conversion_checks import (
    Specs,
    check_alike,
    check_blanks,
    check_groups,
    dimension,
    listed,
    matching,
    shape_of,
    share,
)
from fabric_init.checkpoints.mapping.key_pattern import KeyPattern, Match
from fabric_init.checkpoints.mapping.lazy import Joined, LazyTensor, Run, Stacked, Transposed, Unstacked, swapped
from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.errors import CheckpointMismatchError


class Conversion(Protocol):
    """One declaration; error messages and reports show its ``str()``."""

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        """Return the tensors that replace their sources in a checkpoint with ``specs``, by their new keys.

        Raises:
            CheckpointMismatchError: the checkpoint is not as declared.
        """
        ...


@dataclass(frozen=True)
class Split:
    """One tensor in the checkpoint, several in the model: ``Split("qkv.weight", into=["q.weight", "k.weight", …])``.

    Args:
        source: the tensor's name.
        into: names of its parts, in their order.
        sizes: of the parts along ``dim``; by default they are equal.
        dim: the dimension that is split.
        groups: how often the parts take turns along ``dim``; 1 is one after the other. Where each head has its own q, k
            and v (GPT-NeoX), the number of heads; with grouped queries (litgpt), the number of groups.
    """

    source: str
    _: KW_ONLY
    into: Sequence[str]
    sizes: Sequence[int] | None = None
    dim: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        check_blanks(self, [self.source], listed(self, "into", self.into))
        check_groups(self, self.groups)
        if self.sizes is not None and (len(self.sizes) != len(self.into) or min(self.sizes) < 0):
            raise ValueError(f"{self}: sizes={list(self.sizes)} should be one size for each of {len(self.into)} parts")

    def __str__(self) -> str:
        return _as_source(self, self.source)

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        return dict(part for key, match in matching(specs, self.source) for part in self._parts(key, match, specs[key]))

    def _parts(self, key: str, match: Match, spec: TensorSpec) -> Iterator[tuple[str, LazyTensor]]:
        dim = dimension(key, spec, self.dim)
        full, count = spec.shape[dim], len(self.into)
        sizes = [full // count] * count if self.sizes is None else list(self.sizes)
        if sum(sizes) != full:
            how = f"{count} equal parts" if self.sizes is None else f"sizes={sizes}, together {sum(sizes)},"
            raise CheckpointMismatchError(
                f"{key} is {shape_of(spec)}: {how} do not make up the {full} of dimension {dim}"
            )
        turns = [share(key, spec, size, self.groups) for size in sizes]
        start = 0
        for name, size, turn in zip(self.into, sizes, turns, strict=True):
            shape = torch.Size((*spec.shape[:dim], size, *spec.shape[dim + 1 :]))
            runs = [Run(key, start + group * sum(turns), turn) for group in range(self.groups)]
            yield KeyPattern(name).key(match), Joined(_spec(shape, spec, f"part of {key} {shape_of(spec)}"), dim, runs)
            start += turn


@dataclass(frozen=True)
class Fuse:
    """Several tensors in the checkpoint, one in the model: ``Fuse(["gate.weight", "up.weight"], into="both.weight")``.

    Args:
        sources: names of the parts, in their order.
        into: the name of the one tensor.
        dim: the dimension along which the parts are joined.
        groups: how often the parts take turns along ``dim``, as in :class:`Split`.
    """

    sources: Sequence[str]
    _: KW_ONLY
    into: str
    dim: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        check_blanks(self, listed(self, "the first argument", self.sources), [self.into])
        check_groups(self, self.groups)

    def __str__(self) -> str:
        return _as_source(self, list(self.sources))

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        parts: dict[Match, dict[str, str]] = {}
        for source in self.sources:
            for key, match in matching(specs, source):
                parts.setdefault(match, {})[source] = key
        into = KeyPattern(self.into)
        return {into.key(match): self._joined(match, keys, specs) for match, keys in parts.items()}

    def _joined(self, match: Match, parts: Mapping[str, str], specs: Specs) -> LazyTensor:
        lacking = [KeyPattern(source).key(match) for source in self.sources if source not in parts]
        if lacking:
            raise CheckpointMismatchError(f"there is {', '.join(parts.values())}, but no {', '.join(lacking)}")
        keys = [parts[source] for source in self.sources]
        first = specs[keys[0]]
        dim = dimension(keys[0], first, self.dim)
        for key in keys[1:]:
            check_alike(keys[0], first, key, specs[key], but_for=dim)
        sizes = [specs[key].shape[dim] for key in keys]
        turns = [share(key, specs[key], size, self.groups) for key, size in zip(keys, sizes, strict=True)]
        runs = [
            Run(key, group * turn, turn) for group in range(self.groups) for key, turn in zip(keys, turns, strict=True)
        ]
        shape = torch.Size((*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :]))
        made = "made of " + ", ".join(f"{key} {shape_of(specs[key])}" for key in keys)
        return Joined(_spec(shape, first, made), dim, runs)


@dataclass(frozen=True)
class Stack:
    """Numbered tensors in the checkpoint, one in the model: ``Stack("experts.{}.w1.weight", into="experts.w1")``.

    The last ``{}`` of ``source`` is the number, from 0: the index along a new first dimension.
    """

    source: str
    _: KW_ONLY
    into: str

    def __post_init__(self) -> None:
        check_blanks(self, [self.source], [self.into], more=-1)

    def __str__(self) -> str:
        return _as_source(self, self.source)

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        stacks: dict[Match, dict[int, str]] = {}
        for key, (head, blanks) in matching(specs, self.source):
            if blanks[-1].isdecimal() and len(blanks[-1]) < 10:
                stacks.setdefault(Match(head, blanks[:-1]), {})[int(blanks[-1])] = key
        if not stacks:
            raise CheckpointMismatchError(f"no key ends in {self.source!r} with a number for the last {{}}")
        into = KeyPattern(self.into)
        return {into.key(match): self._stacked(match, keys, specs) for match, keys in stacks.items()}

    def _stacked(self, match: Match, numbered: Mapping[int, str], specs: Specs) -> LazyTensor:
        for number in range(max(numbered)):
            if number not in numbered:
                key = KeyPattern(self.source).key(Match(match.head, (*match.blanks, str(number))))
                raise CheckpointMismatchError(f"there is {numbered[max(numbered)]}, but no {key}")
        keys = [numbered[number] for number in range(len(numbered))]
        first = specs[keys[0]]
        for key in keys[1:]:
            check_alike(keys[0], first, key, specs[key])
        made = f"{len(keys)} tensors {shape_of(first)} stacked, {keys[0]} and on"
        return Stacked(_spec(torch.Size((len(keys), *first.shape)), first, made), keys)


@dataclass(frozen=True)
class Unstack:
    """One tensor in the checkpoint, numbered ones in the model: ``Unstack("experts.w1", into="experts.{}.w1.weight")``.

    The last ``{}`` of ``into`` becomes the number, from 0: the index along the first dimension.
    """

    source: str
    _: KW_ONLY
    into: str

    def __post_init__(self) -> None:
        check_blanks(self, [self.source], [self.into], more=1)

    def __str__(self) -> str:
        return _as_source(self, self.source)

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        made: dict[str, LazyTensor] = {}
        into = KeyPattern(self.into)
        for key, (head, blanks) in matching(specs, self.source):
            spec = specs[key]
            count = spec.shape[dimension(key, spec, 0)]
            if not spec.shape.numel():  # a header may then claim any count
                raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: there is nothing in it")
            for index in range(count):
                part = _spec(spec.shape[1:], spec, f"number {index} of {key} {shape_of(spec)}")
                made[into.key(Match(head, (*blanks, str(index))))] = Unstacked(part, key, index)
        return made


@dataclass(frozen=True)
class Transpose:
    """Tensors whose last two dimensions are swapped, as in GPT-2: ``Transpose(["c_attn.weight", "c_proj.weight"])``."""

    names: Sequence[str]

    def __post_init__(self) -> None:
        for name in listed(self, "the argument", self.names):
            KeyPattern(name)

    def __str__(self) -> str:
        return _as_source(self, list(self.names))

    def made(self, specs: Specs) -> Mapping[str, LazyTensor]:
        made: dict[str, LazyTensor] = {}
        for name in self.names:
            for key, _ in matching(specs, name):
                spec = specs[key]
                if len(spec.shape) < 2:
                    raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: there are no two dimensions to swap")
                shape = torch.Size(swapped(spec.shape))
                made[key] = Transposed(_spec(shape, spec, f"transposed from {shape_of(spec)}"), key)
        return made


def _as_source(conversion: Split | Fuse | Stack | Unstack | Transpose, first: object) -> str:
    """Return the declaration as source code."""
    others = [field for field in fields(conversion)[1:] if getattr(conversion, field.name) != field.default]
    named = [f"{field.name}={getattr(conversion, field.name)!r}" for field in others]
    return f"{type(conversion).__name__}({', '.join([repr(first), *named])})"


def _spec(shape: torch.Size, source: TensorSpec, made: str) -> TensorSpec:
    return TensorSpec(shape, source.dtype, made)
