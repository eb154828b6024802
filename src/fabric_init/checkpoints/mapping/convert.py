"""Declare how tensors of a checkpoint differ from the model's: joined or split, stacked, transposed.

Keys are named by their ends, see :class:`~fabric_init.checkpoints.mapping.key_pattern.KeyPattern`:
``"qkv_proj.weight"`` stands for that tensor of every layer, whatever comes before, and what comes before is kept.
``{}`` stands for one dotted part that differs, and stands for the same in ``into``.

A declaration says which keys become which, and by which function of tensors. Wrong arguments are a ``ValueError``; what
does not fit the checkpoint is a :class:`~fabric_init.errors.CheckpointMismatchError` when it is opened, before any
weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.mapping.conversion_checks import (
    Specs,
    check_alike,
    check_blanks,
    check_groups,
    check_shares,
    dimension,
    listed,
    matching,
    shape_of,
)
from fabric_init.checkpoints.mapping.key_pattern import KeyPattern, Match
from fabric_init.errors import CheckpointMismatchError


class ConversionResult(NamedTuple):
    """Tensors that are made of others, which they replace.

    ``function`` takes the tensors under ``sources``, in that order, and returns those under ``keys``. It runs without
    values, once for all tensors of the same shapes and dtypes: what it does with them is repeated for the others.
    """

    keys: Sequence[str]
    sources: Sequence[str]
    function: Callable[..., Iterable[Tensor]]


class Conversion(Protocol):
    """One declaration; error messages and reports show its ``str()``."""

    def results(self, specs: Specs) -> Iterable[ConversionResult]:
        """Yield the tensors that replace others in a checkpoint with ``specs``.

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

    def results(self, specs: Specs) -> Iterator[ConversionResult]:
        function = self._parts
        for key, match in matching(specs, self.source):
            spec = specs[key]
            dim = dimension(key, spec, self.dim)
            full, sizes = spec.shape[dim], self._sizes(spec.shape[dim])
            if sum(sizes) != full:
                how = f"sizes={sizes}, together {sum(sizes)}," if self.sizes else f"{len(sizes)} equal parts"
                raise CheckpointMismatchError(
                    f"{key} is {shape_of(spec)}: {how} do not make up the {full} of dimension {dim}"
                )
            check_shares(key, spec, sizes, self.groups)
            yield ConversionResult([KeyPattern(name).key(match) for name in self.into], [key], function)

    def _sizes(self, full: int) -> list[int]:
        return list(self.sizes) if self.sizes else [full // len(self.into)] * len(self.into)

    def _parts(self, whole: Tensor) -> Iterator[Tensor]:
        turns = [size // self.groups for size in self._sizes(whole.shape[self.dim])]
        groups = [group.split(turns, self.dim) for group in whole.tensor_split(self.groups, self.dim)]
        return (part[0] if len(part) == 1 else torch.cat(part, self.dim) for part in zip(*groups, strict=True))


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

    def results(self, specs: Specs) -> Iterator[ConversionResult]:
        parts: dict[Match, dict[str, str]] = {}
        for source in self.sources:
            for key, match in matching(specs, source):
                parts.setdefault(match, {})[source] = key
        into, function = KeyPattern(self.into), self._joined
        for match, keys in parts.items():
            yield ConversionResult([into.key(match)], self._checked(match, keys, specs), function)

    def _checked(self, match: Match, parts: Mapping[str, str], specs: Specs) -> list[str]:
        lacking = [KeyPattern(source).key(match) for source in self.sources if source not in parts]
        if lacking:
            raise CheckpointMismatchError(f"there is {', '.join(parts.values())}, but no {', '.join(lacking)}")
        keys = [parts[source] for source in self.sources]
        first = specs[keys[0]]
        dim = dimension(keys[0], first, self.dim)
        for key in keys[1:]:
            check_alike(keys[0], first, key, specs[key], but_for=dim)
        for key in keys:
            check_shares(key, specs[key], [specs[key].shape[dim]], self.groups)
        return keys

    def _joined(self, *parts: Tensor) -> Iterator[Tensor]:
        groups = zip(*(part.tensor_split(self.groups, self.dim) for part in parts), strict=True)
        yield torch.cat([part for group in groups for part in group], self.dim)


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

    def results(self, specs: Specs) -> Iterator[ConversionResult]:
        stacks: dict[Match, dict[int, str]] = {}
        for key, (head, blanks) in matching(specs, self.source):
            if blanks[-1].isdecimal() and len(blanks[-1]) < 10:
                stacks.setdefault(Match(head, blanks[:-1]), {})[int(blanks[-1])] = key
        if not stacks:
            raise CheckpointMismatchError(f"no key ends in {self.source!r} with a number for the last {{}}")
        into = KeyPattern(self.into)
        for match, numbered in stacks.items():
            yield ConversionResult([into.key(match)], self._checked(match, numbered, specs), _stacked)

    def _checked(self, match: Match, numbered: Mapping[int, str], specs: Specs) -> list[str]:
        for number in range(max(numbered)):
            if number not in numbered:
                key = KeyPattern(self.source).key(Match(match.head, (*match.blanks, str(number))))
                raise CheckpointMismatchError(f"there is {numbered[max(numbered)]}, but no {key}")
        keys = [numbered[number] for number in range(len(numbered))]
        for key in keys[1:]:
            check_alike(keys[0], specs[keys[0]], key, specs[key])
        return keys


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

    def results(self, specs: Specs) -> Iterator[ConversionResult]:
        into = KeyPattern(self.into)
        for key, (head, blanks) in matching(specs, self.source):
            spec = specs[key]
            count = spec.shape[dimension(key, spec, 0)]
            if not spec.shape.numel():  # a header may then claim any count
                raise CheckpointMismatchError(f"{key} is {shape_of(spec)}: there is nothing in it")
            keys = [into.key(Match(head, (*blanks, str(index)))) for index in range(count)]
            yield ConversionResult(keys, [key], torch.unbind)


@dataclass(frozen=True)
class Transpose:
    """Tensors whose last two dimensions are swapped, as in GPT-2: ``Transpose(["c_attn.weight", "c_proj.weight"])``."""

    names: Sequence[str]

    def __post_init__(self) -> None:
        for name in listed(self, "the argument", self.names):
            KeyPattern(name)

    def __str__(self) -> str:
        return _as_source(self, list(self.names))

    def results(self, specs: Specs) -> Iterator[ConversionResult]:
        for name in self.names:
            for key, _ in matching(specs, name):
                if len(specs[key].shape) < 2:
                    raise CheckpointMismatchError(
                        f"{key} is {shape_of(specs[key])}: there are no two dimensions to swap"
                    )
                yield ConversionResult([key], [key], _transposed)


def _stacked(*parts: Tensor) -> tuple[Tensor]:
    return (torch.stack(parts),)


def _transposed(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.transpose(-1, -2),)


def _as_source(conversion: Split | Fuse | Stack | Unstack | Transpose, first: object) -> str:
    """Return the declaration as source code."""
    others = [field for field in fields(conversion)[1:] if getattr(conversion, field.name) != field.default]
    named = [f"{field.name}={getattr(conversion, field.name)!r}" for field in others]
    return f"{type(conversion).__name__}({', '.join([repr(first), *named])})"
