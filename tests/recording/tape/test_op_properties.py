"""Properties derived from operator schemas agree with what the operators do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_init.recording.tape.op_properties import (
    DRAWS_FROM_DEFAULT,
    INIT_FUNCTIONS,
    is_random,
    overwrites,
    traits,
    with_generator,
    written_arguments,
)

aten = torch.ops.aten


def test_all_of_torch_nn_init_is_known() -> None:
    fills = {
        name
        for name, value in vars(nn.init).items()
        if callable(value) and name.endswith("_") and not name.startswith("_")
    }
    assert fills == set(INIT_FUNCTIONS)


@pytest.mark.parametrize("name", sorted(INIT_FUNCTIONS))
def test_an_init_function_is_random_exactly_if_two_seeds_differ(name: str) -> None:
    extra = {"constant_": (0.5,), "sparse_": (0.5,)}.get(name, ())
    shape = (4, 4, 3) if name == "dirac_" else (4, 4)
    filled = [
        INIT_FUNCTIONS[name](torch.empty(shape), *extra) for seed in (0, 1) if torch.manual_seed(seed) is not None
    ]
    assert is_random(INIT_FUNCTIONS[name]) == (not torch.equal(*filled))


@pytest.mark.parametrize("name", sorted(INIT_FUNCTIONS))
def test_an_init_function_draws_from_its_generator_unless_listed(name: str) -> None:
    if not is_random(INIT_FUNCTIONS[name]):
        return
    extra = {"sparse_": (0.5,)}.get(name, ())
    before = torch.get_rng_state()
    INIT_FUNCTIONS[name](torch.empty(4, 4), *extra, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state()) == (name not in DRAWS_FROM_DEFAULT)
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    "func",
    [aten.fill_.Scalar, aten.zero_.default, aten.copy_.default, aten.uniform_.default, aten.normal_.default,
     aten.log_normal_.default, aten.cauchy_.default, aten.exponential_.default, aten.geometric_.default,
     aten.random_.default, aten.bernoulli_.float],
    ids=str,
)  # fmt: skip
def test_what_is_called_overwriting_does_not_depend_on_the_old_value(func) -> None:  # type: ignore[no-untyped-def]
    arguments = {"fill_": (2.0,), "copy_": (torch.ones(5),), "geometric_": (0.5,)}.get(func.__name__.split(".")[0], ())
    results = []
    for old in (0.25, 0.75):
        torch.manual_seed(0)
        results.append(func(torch.full((5,), old), *arguments))
    assert overwrites(func)
    assert torch.equal(*results)


@pytest.mark.parametrize("func", [aten.mul_.Tensor, aten.add_.Tensor, aten.index_put_.default, aten.clamp_.default])
def test_arithmetic_in_place_is_not_called_overwriting(func) -> None:  # type: ignore[no-untyped-def]
    assert not overwrites(func)
    assert 0 in written_arguments(func)[0]


def test_every_random_operator_has_a_generator_or_is_drawn_from_the_default_one() -> None:
    for func in (aten.randn.default, aten.rand.default, aten.randint.default, aten.randperm.default):
        assert is_random(func)
        assert traits(with_generator(func)).takes_generator
    assert with_generator(aten.rand_like.default) is None or traits(with_generator(aten.rand_like.default))
    assert is_random(aten.native_dropout.default)
    assert not is_random(aten.zeros.default)


def test_batch_norm_writes_its_running_statistics_though_its_schema_does_not_say_so() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    aten.native_batch_norm.default(torch.randn(4, 3), None, None, mean, var, True, 0.1, 1e-5)
    assert float(mean.abs().sum()) > 0
    assert {3, 4} <= written_arguments(aten.native_batch_norm.default)[0]
