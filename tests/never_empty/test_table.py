"""No way of touching a tensor, wherever a model keeps it, gives anything but its values or an error of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from fabric_init import Fabric, deferred_init, materialize
from tests.never_empty.model_ways import COMPILED, DOES_NOT_APPLY, MODELS
from tests.never_empty.outcomes import REFUSED, RIGHT, outcome, run
from tests.never_empty.targets import TARGETS, Target
from tests.never_empty.ways import COPIES, OPERATORS, VALUES, WRITES_OF_REAL_TENSORS, Case, Way
from tests.test_never_empty import poisoned_memory

FABRIC = Fabric(accelerator="cpu", devices=1)
WAYS: dict[str, Way] = {**OPERATORS, **WRITES_OF_REAL_TENSORS, **VALUES, **COPIES, **COMPILED, **MODELS}


def deferred(kind: type[Target]) -> Target:
    with deferred_init():
        return kind()


def unfilled(kind: type[Target]) -> Target:
    with FABRIC.init_module(empty_init=True):
        return kind()


def materialized(kind: type[Target]) -> Target:
    model = deferred(kind)
    materialize(model)
    return model


STATES: dict[str, Callable[[type[Target]], Target]] = {
    "deferred_init": deferred,
    "empty_init": unfilled,
    "materialized": materialized,
}
HELD = "parameter of a module in a dict"
"""What a model does that holds such a module says nothing about it: the model waits for a parameter of its own."""
FILLED = ("parameter", "persistent buffer", "tied parameter", "view from the constructor", "closure", "slots")
"""Targets that are touched after ``materialize``, too, where nothing may be refused."""


def targets_of(way: str, state: str) -> list[str]:
    """Return what is touched in one way, in one state."""
    targets = FILLED if state == "materialized" else TARGETS
    return [
        target
        for target in targets
        if (way, target) not in DOES_NOT_APPLY and not (target == HELD and (way in MODELS or way in COMPILED))
    ]


CELLS = [(way, target, state) for way in WAYS for state in STATES for target in targets_of(way, state)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@cache
def eager(way: str, target: str) -> Any:
    """Return what plain PyTorch gives."""
    return run(WAYS[way], Case(TARGETS[target]()))


PAST_OUR_CODE = "p.data ="
"""What a plain parameter takes as its data does not come to a recorded tensor: torch refuses it, with values or not."""


JIT_TRACES = ("traced function", "jit.trace", "jit.trace, saved")
"""These may hold a tensor from C++ before anybody asks for its values, so that it cannot become a plain one in time."""


def wanted(way: str, target: str, state: str) -> tuple[str, ...]:
    """Return what may become of a cell."""
    if way == PAST_OUR_CODE and (state == "deferred_init" or (state == "empty_init" and target == HELD)):
        return (REFUSED,)
    if TARGETS[target].waits and state != "materialized":
        return (REFUSED,)
    return (RIGHT, REFUSED, f"refused, and then {RIGHT}") if way in JIT_TRACES and state != "materialized" else (RIGHT,)


def test_the_table_is_large() -> None:
    assert len(CELLS) >= 300
    assert len(WAYS) >= 25
    assert len(TARGETS) >= 8


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
def test_right_or_refused(way: str, state: str) -> None:
    targets = targets_of(way, state)
    found = {
        target: outcome(WAYS[way], lambda target=target: STATES[state](TARGETS[target]), eager(way, target))
        for target in targets
    }
    assert {target: one for target, one in found.items() if one not in wanted(way, target, state)} == {}
