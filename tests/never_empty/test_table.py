"""No way of touching a tensor without values, wherever it is kept, gives anything but its values or an error of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from fabric_init import Fabric, deferred_init
from tests.never_empty.model_ways import COMPILED, MODELS
from tests.never_empty.outcomes import REFUSED, RIGHT, outcome, run
from tests.never_empty.targets import TARGETS, Target
from tests.never_empty.ways import COPIES, OPERATORS, VALUES, WRITES_OF_REAL_TENSORS, Case, Way
from tests.test_never_empty import poisoned_memory

WAYS: dict[str, Way] = {**OPERATORS, **WRITES_OF_REAL_TENSORS, **VALUES, **COPIES, **COMPILED, **MODELS}
FABRIC = Fabric(accelerator="cpu", devices=1)


def deferred(kind: type[Target]) -> Target:
    with deferred_init():
        return kind()


def unfilled(kind: type[Target]) -> Target:
    with FABRIC.init_module(empty_init=True):
        return kind()


STATES: dict[str, Callable[[type[Target]], Target]] = {"deferred_init": deferred, "empty_init": unfilled}
CELLS = list(product(WAYS, TARGETS, STATES))
"""Every way × target × state."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@cache
def eager(way: str, target: str) -> Any:
    """Return what plain PyTorch gives."""
    return run(WAYS[way], Case(TARGETS[target]()))


def test_the_table_is_large() -> None:
    assert len(CELLS) >= 300


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", WAYS)
def test_right_or_refused(way: str, target: str, state: str) -> None:
    kind = TARGETS[target]
    found = outcome(WAYS[way], lambda: STATES[state](kind), eager(way, target))
    assert found == (REFUSED if kind.waits else RIGHT)
