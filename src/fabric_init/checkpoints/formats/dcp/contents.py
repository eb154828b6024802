"""The contents of a checkpoint of ``torch.distributed.checkpoint``, as plain data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box
from fabric_init.checkpoints.state_dicts import EXTRA_STATE, OPTIMIZER_PARTS, Location


@dataclass(frozen=True, slots=True)
class Item:
    """The place of one saved object: ``length`` bytes of a file in the folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and its place."""

    box: Box
    item: Item


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the checkpoint; its chunks fill it and do not overlap."""

    location: Location
    name: str
    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """All of a checkpoint, under the keys that it was flattened to."""

    tensors: dict[str, TensorEntry]
    objects: dict[str, tuple[Location, str, Item]]
    """Location, name and place of everything that is not a tensor."""
    ends: dict[str, int] = field(default_factory=dict)
    """File name -> the byte after its last item."""

    def paths(self) -> Iterator[tuple[Location, str]]:
        """Yield each entry's nested keys from before flattening, and its flattened key."""
        for key, tensor in self.tensors.items():
            yield (*tensor.location, tensor.name), key
        for key, (location, name, _) in self.objects.items():
            yield (*location, name), key

    def state_dicts(self) -> dict[Location, int]:
        """Return the number of tensors in each dict, without those of optimizers and of extra state."""
        parts: defaultdict[Location, set[str]] = defaultdict(set)
        for path, _ in self.paths():
            for depth, key in enumerate(path):
                parts[path[:depth]].add(key.partition(".")[0])  # an optimizer's may be flattened to "state.0.exp_avg"
        optimizers = {location for location, names in parts.items() if names >= OPTIMIZER_PARTS}
        counts = Counter(tensor.location for tensor in self.tensors.values())
        return {
            location: count
            for location, count in counts.items()
            if not any(location[:depth] in optimizers for depth in range(len(location) + 1))
            and not any(key.endswith(EXTRA_STATE) for key in location)
        }

    def extra_state(self, location: Location) -> Iterator[tuple[Location, str]]:
        """Yield path in the state dict at ``location``, and key, of extra state that is not one of its tensors."""
        depth = len(location)
        for path, key in self.paths():
            is_weight = key in self.tensors and len(path) == depth + 1
            inside = len(path) > depth and path[:depth] == location
            if inside and path[depth].endswith(EXTRA_STATE) and not is_weight:
                yield path[depth:], key
