"""Models that each use one tensor, kept in one of the places where models keep tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

SIZE = 4


def values() -> Tensor:
    """Return what every target holds: no two elements are equal, and none is what memory may hold by chance."""
    return torch.linspace(0.125, 1.125, SIZE * SIZE).view(SIZE, SIZE)


class Target(nn.Module):
    """A model that keeps a tensor somewhere and computes with it.

    Attributes:
        waits: whether the tensor waits for values once a model that was built without a checkpoint has left its block.
    """

    waits: ClassVar[bool] = True

    def held(self) -> Tensor:
        """Return the tensor that is touched."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.held())


class Parameter(Target):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(values())

    def held(self) -> Tensor:
        return self.weight


class FilledInTwoSteps(Parameter):
    """Its parameter is made empty and written afterwards, as layers of torch.nn make theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, SIZE))
        with torch.no_grad():
            self.weight[:2].copy_(values()[:2])
            self.weight[2:].copy_(values()[2:])


class Buffer(Target):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", values())

    def held(self) -> Tensor:
        return self.scale


class Tied(Target):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SIZE, SIZE)
        self.head = nn.Linear(SIZE, SIZE, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            self.head.weight.copy_(values())

    def held(self) -> Tensor:
        return self.embedding.weight


class KeptView(Parameter):
    def __init__(self) -> None:
        super().__init__()
        self.transposed = self.weight.detach().t()

    def held(self) -> Tensor:
        return self.transposed.t()


class LaterView(Parameter):
    def held(self) -> Tensor:
        return self.weight.view(2, 2 * SIZE).view(SIZE, SIZE)


class DetachedAlias(Parameter):
    def held(self) -> Tensor:
        return self.weight.detach()


class DataAlias(Parameter):
    def held(self) -> Tensor:
        return self.weight.data


class HeldModule(Parameter):
    """Another module in a dict, which is no submodule and in no state dict, so that no load is to bring it."""

    waits = False

    def __init__(self) -> None:
        super().__init__()
        self.losses = {"x": Parameter()}

    def held(self) -> Tensor:
        return self.losses["x"].weight


class ComputedParameter(Parameter):
    """A parameter that is computed from another one, as DoRA's magnitudes are."""

    def __init__(self) -> None:
        super().__init__()
        self.magnitude = nn.Parameter(self.weight.detach() * 2)

    def held(self) -> Tensor:
        return self.magnitude


class Given(Target):
    """Its tensor has the constructor's value, which is the only one that it ever gets: no state dict holds it."""

    waits = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1), persistent=False)  # a block knows modules by what they register


class ScratchBuffer(Given):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", values(), persistent=False)

    def held(self) -> Tensor:
        return self.angles


class Attribute(Given):
    def __init__(self) -> None:
        super().__init__()
        self.table = values()

    def held(self) -> Tensor:
        return self.table


class Closure(Given):
    def __init__(self) -> None:
        super().__init__()
        table = values()
        self.get: Callable[[], Tensor] = lambda: table

    def held(self) -> Tensor:
        return self.get()


def _first(table: Tensor, *rest: Any) -> Tensor:
    return table


class Partial(Given):
    def __init__(self) -> None:
        super().__init__()
        self.get = partial(_first, values())

    def held(self) -> Tensor:
        return self.get()


class _Slots:
    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        self.table = table


class Slots(Given):
    def __init__(self) -> None:
        super().__init__()
        self.cache = _Slots(values())

    def held(self) -> Tensor:
        return self.cache.table


class ClassAttribute(Given):
    table: ClassVar[Tensor]

    def __init__(self) -> None:
        super().__init__()
        type(self).table = values()

    def held(self) -> Tensor:
        return type(self).table


class Deque(Given):
    def __init__(self) -> None:
        super().__init__()
        self.history = deque([values()], maxlen=2)

    def held(self) -> Tensor:
        return self.history[0]


class ComputedAttribute(Given):
    """A table whose last step of computation is made after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.half = values() / 2

    def held(self) -> Tensor:
        return self.half * 2


TARGETS: dict[str, type[Target]] = {
    "parameter": Parameter,
    "parameter in two steps": FilledInTwoSteps,
    "persistent buffer": Buffer,
    "tied parameter": Tied,
    "view from the constructor": KeptView,
    "view made later": LaterView,
    "detached alias": DetachedAlias,
    "alias by .data": DataAlias,
    "parameter of a module in a dict": HeldModule,
    "computed parameter": ComputedParameter,
    "other buffer": ScratchBuffer,
    "attribute": Attribute,
    "closure": Closure,
    "partial": Partial,
    "slots": Slots,
    "class attribute": ClassAttribute,
    "deque": Deque,
    "computed attribute": ComputedAttribute,
}
