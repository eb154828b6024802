"""Init code that the user puts on modules after the block, for ``setup`` to run."""

from __future__ import annotations

from functools import partial

from torch import nn

from fabric_init import deferred_init, materialize
from fabric_init.filling.init_missing import run_replaced_init
from fabric_init.guard.waiting_tensors import unfilled


def ones(module: nn.Linear) -> None:
    nn.init.ones_(module.weight)
    nn.init.ones_(module.bias)


def build() -> nn.Sequential:
    with deferred_init():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].reset_parameters = partial(ones, model[0])  # type: ignore[method-assign]
    return model


def test_a_replaced_reset_parameters_is_run_and_no_other() -> None:
    model = build()
    run_replaced_init(model)
    assert [name for name, _ in unfilled(model)] == ["1.weight", "1.bias"]
    materialize(model)
    assert bool((model[0].weight == 1).all())
    assert not bool((model[1].weight == 1).all())


def test_it_leaves_alone_what_a_declared_load_brings() -> None:
    model = build()
    run_replaced_init(model, {id(model[0].weight)})
    assert len(unfilled(model)) == 4
