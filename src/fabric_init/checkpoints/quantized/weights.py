"""What all schemes have in common: a weight that is computed, for a part of it, from parts of what is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box, Region, Span

Read = Callable[[str, "Region | None"], Tensor]
"""Returns a region of what is stored under a key."""


class Stored(NamedTuple):
    """A checkpoint, as schemes look at it to find their weights."""

    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    """The ``quantization_config`` of config.json; empty if there is none."""
    read: Read
    fields: Mapping[str, Any] = MappingProxyType({})
    """What the file states beside its tensors."""
    block: Sequence[int] | None = None
    """The size of blocks that the user has given."""

    @property
    def method(self) -> str:
        """The scheme that the config names; empty if it names none."""
        return str(self.config.get("quant_method", ""))


class Quantized(Protocol):
    """One weight. ``key`` and ``spec`` are those that it has as a plain one."""

    @property
    def key(self) -> str: ...

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def sources(self) -> Sequence[str]:
        """What it is made of; these keys are gone afterwards."""
        ...

    def values(self, read: Read, box: Box) -> Tensor:
        """Return a box of it, which has elements."""
        ...


Scheme = Callable[[Stored], "Sequence[Quantized]"]
"""Returns the weights of a checkpoint that are quantized in one way.

Raises:
    CheckpointMismatchError: some are, and cannot be dequantized.
"""


def module_of(key: str, ending: str) -> str | None:
    """Return what comes before the last part of a key, with its dot; ``None`` if that is another one."""
    module = key.removesuffix(ending)
    return module if module != key and (not module or module.endswith(".")) else None


def weights_of_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what the config of compressed-tensors says of the weights of each group of modules."""
    groups = config.get("config_groups")
    found = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    return [weights for weights in found if isinstance(weights, Mapping)]


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` numbers that are packed in the last dimension of 32-bit ``words``, the lowest bits first."""
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    first = torch.arange(count, device="cpu") * bits
    word, shift = first // 32, first % 32
    # Both words together: a number may begin in one and end in the next.
    return ((wide[..., word] | (wide[..., word + 1] << 32)) >> shift) & ((1 << bits) - 1)


def packed_span(start: int, stop: int, bits: int, words: int) -> tuple[Span, int]:
    """Return the words that hold numbers ``start:stop``, of ``words`` in all, and the number that they begin with."""
    group = 32  # numbers that fill whole words, however many bits each has
    first = start // group
    return Span(first * bits, min(-(-stop // group) * bits, words)), first * group
