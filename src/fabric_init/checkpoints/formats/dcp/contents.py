"""What a checkpoint of ``torch.distributed.checkpoint`` has in it, as its metadata says."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box
from fabric_init.checkpoints.state_dicts import EXTRA_STATE, OPTIMIZER_PARTS, Location


@dataclass(frozen=True, slots=True)
class Item:
    """Where one saved object lies: ``length`` bytes of a file of the folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and where it lies."""

    box: Box
    item: Item


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the checkpoint; its chunks fill it and do not overlap."""

    location: Location
    name: str
    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """All of a checkpoint, under the keys that it was flattened to."""

    tensors: dict[str, Tensor]
    objects: dict[str, tuple[Location, str, Item]]
    """What are no tensors: location, name and place."""
    ends: dict[str, int] = field(default_factory=dict)
    """Of each file, the byte behind the last thing in it."""

    def paths(self) -> Iterator[tuple[Location, str]]:
        """The keys that led to each entry before it was flattened, and its own."""
        for key, tensor in self.tensors.items():
            yield (*tensor.location, tensor.name), key
        for key, (location, name, _) in self.objects.items():
            yield (*location, name), key

    def state_dicts(self) -> dict[Location, int]:
        """How many tensors each dict has; not those of an optimizer's state dict, nor of extra state."""
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
        """Path within the state dict at ``location``, and key, of extra state that is no tensor of the state dict."""
        depth = len(location)
        for path, key in self.paths():
            is_weight = key in self.tensors and len(path) == depth + 1
            inside = len(path) > depth and path[:depth] == location
            if inside and path[depth].endswith(EXTRA_STATE) and not is_weight:
                yield path[depth:], key
