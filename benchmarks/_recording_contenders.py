"""The ways to build a module of many small parameters without taking its memory, and eager to compare with.

Each is a context to build in; entering and leaving it is timed, importing it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn


def phases(name: str, layers: str, experts: str, width: str) -> Generator[tuple[str, Callable[[], Any]], Any, None]:
    context = CONTENDERS[name]()

    def build() -> nn.Module:
        with context:
            return MixtureOfExperts(int(layers), int(experts), int(width))

    model = yield "ready", build
    yield "verify", lambda: {"parameters": sum(1 for _ in model.parameters())}


class Expert(nn.Module):
    """The three linears of a gated MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)


class MixtureOfExperts(nn.Module):
    def __init__(self, layers: int, experts: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(Expert(width) for _ in range(experts)) for _ in range(layers))


def eager() -> AbstractContextManager[Any]:
    return nullcontext()


def meta() -> AbstractContextManager[Any]:
    return torch.device("meta")


def meta_without_init() -> AbstractContextManager[Any]:
    """A lower bound: meta, with ``torch.nn.init`` doing nothing at all."""
    for name in vars(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    return torch.device("meta")


def fake() -> AbstractContextManager[Any]:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


def ours() -> AbstractContextManager[Any]:
    from fabric_init import deferred_init

    return deferred_init()


CONTENDERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    contender.__name__: contender for contender in (eager, meta, meta_without_init, fake, ours)
}
