"""Random numbers: seeds, forks and rewinds in a constructor, generators of its own, and streams that do not collide."""

from __future__ import annotations

from collections.abc import Callable

import lightning
import pytest
import torch
from torch import nn

from fabric_init import Fabric, deferred_init
from fabric_init.api import materialize
from fabric_init.errors import RecordingError
from fabric_init.recording.tape.seeds import derived_seed
from fabric_init.recording.tape.tape import Rng


def build(make: Callable[[], list[torch.Tensor]], rng: str, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Module()
    with deferred_init(rng=rng):  # type: ignore[arg-type]
        model.made = nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in make()])
    materialize(model)
    return [tensor.detach() for tensor in model.made]


def eager(make: Callable[[], list[torch.Tensor]], seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return make()


def seeded() -> list[torch.Tensor]:
    made = [torch.randn(3)]
    torch.manual_seed(5)
    made.append(torch.randn(3))
    torch.manual_seed(5)
    return [*made, torch.randn(3), torch.rand(2)]


def forked() -> list[torch.Tensor]:
    made = [torch.randn(3)]
    with torch.random.fork_rng(devices=[]):
        made.append(torch.randn(3))
        torch.manual_seed(9)
        made.append(torch.randn(3))
    return [*made, torch.randn(3)]


def rewound() -> list[torch.Tensor]:
    torch.randn(2)
    state = torch.get_rng_state()
    made = [torch.randn(3), torch.randn(3)]
    torch.set_rng_state(state)
    return [*made, torch.randn(3), torch.randn(4)]


def own_generator() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(3, generator=g), torch.randn(2), torch.randperm(5, generator=g), torch.rand(3, generator=g)]


MAKERS = [seeded, forked, rewound, own_generator]


@pytest.mark.parametrize("make", MAKERS)
def test_exact_streams_are_drawn_as_eager_code_draws_them(make: Callable[[], list[torch.Tensor]]) -> None:
    for expected, actual in zip(eager(make), build(make, "eager"), strict=True):
        assert torch.equal(expected, actual)


def test_a_seed_of_the_constructors_own_gives_eager_values_in_per_op_mode_too() -> None:
    expected, actual = eager(seeded), build(seeded, "per_op")
    assert not torch.equal(expected[0], actual[0])
    assert all(torch.equal(a, b) for a, b in zip(expected[1:], actual[1:], strict=True))


def test_a_generator_of_the_constructors_own_gives_eager_values_in_per_op_mode_too() -> None:
    expected, actual = eager(own_generator), build(own_generator, "per_op")
    assert [torch.equal(a, b) for a, b in zip(expected, actual, strict=True)] == [True, False, True, True]


def test_a_rewound_stream_repeats_itself_in_per_op_mode_too() -> None:
    first, second, again, _ = build(rewound, "per_op")
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_seed_gives_the_same_values_and_another_seed_others(make: Callable[[], list[torch.Tensor]]) -> None:
    first, same, other = build(make, "per_op"), build(make, "per_op"), build(make, "per_op", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_draws_of_one_model_never_share_a_seed() -> None:
    seeds = {derived_seed(seed, position) for seed in range(50) for position in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_a_generator_used_on_after_the_block_does_not_repeat_the_weights() -> None:
    g = torch.Generator().manual_seed(4)
    model = nn.Module()
    with deferred_init():
        model.weight = nn.Parameter(torch.randn(6, generator=g))
    later = torch.randn(6, generator=g)
    materialize(model)
    assert not torch.equal(model.weight.detach(), later)


def test_numbers_drawn_after_the_block_do_not_repeat_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    with deferred_init(rng="eager"):
        model.weight = nn.Parameter(torch.randn(6))
    later = torch.randn(6)
    materialize(model)
    assert not torch.equal(model.weight.detach(), later)


@pytest.mark.parametrize("rng", ["per_op", "eager"])
def test_a_seed_that_the_constructor_sets_holds_for_what_is_drawn_after_the_block(rng: Rng) -> None:
    after, weights = [], []
    for outer in (1, 2):
        torch.manual_seed(outer)
        model = nn.Module()
        with deferred_init(rng=rng):
            torch.manual_seed(5)
            model.weight = nn.Parameter(torch.randn(6))
        after.append(torch.randn(6))
        materialize(model)
        weights.append(model.weight.detach())
    assert torch.equal(*after)
    assert torch.equal(*weights)
    assert not torch.equal(after[0], weights[0])


def test_a_seed_in_a_fork_does_not_hold_after_the_block() -> None:
    after = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        with deferred_init():
            forked()
        after.append(torch.randn(6))
    assert not torch.equal(*after)


def test_filling_leaves_the_default_stream_where_it_was() -> None:
    model = nn.Module()
    with deferred_init(rng="eager"):
        model.weight = nn.Parameter(torch.nn.init.sparse_(torch.empty(4, 4), 0.5))
        model.order = torch.randperm(5)
    before = torch.get_rng_state()
    materialize(model)
    assert torch.equal(before, torch.get_rng_state())


def test_values_shown_in_one_mode_cannot_be_filled_in_the_other() -> None:
    model = nn.Module()
    with deferred_init(rng="per_op"):
        model.weight = nn.Parameter(torch.randn(3))
        model.weight.tolist()
    with pytest.raises(RecordingError, match="rng='eager'"):
        materialize(model, rng="eager")
    materialize(model)


def built(fabric: lightning.Fabric, seed: int | None = 0, inner: int | None = None) -> nn.Sequential:
    """A model that is built without init, from a seed, of the block too, or from where the generator is."""
    if seed is not None:
        torch.manual_seed(seed)
    with fabric.init_module(empty_init=True):
        if inner is not None:
            torch.manual_seed(inner)
        return nn.Sequential(nn.Linear(4, 8), nn.Embedding(3, 3), nn.Conv1d(2, 2, 1), nn.LSTM(2, 2), nn.Linear(8, 1))


FABRIC = Fabric(accelerator="cpu", devices=1)


@pytest.mark.parametrize("inner", [None, 7])
def test_empty_init_leaves_torchs_generator_where_lightnings_leaves_it(inner: int | None) -> None:
    built(lightning.Fabric(accelerator="cpu", devices=1), inner=inner)
    expected = torch.get_rng_state()
    built(FABRIC, inner=inner)
    assert torch.equal(torch.get_rng_state(), expected)


def test_models_that_skip_init_from_one_state_have_own_inits_that_differ() -> None:
    models = [built(FABRIC, seed) for seed in (0, None, None)]
    for model in models:
        FABRIC.init_missing(model)
    models.append(built(FABRIC, seed=None))
    FABRIC.init_missing(models[-1])
    for position in (0, 4):
        first = [model[position].weight.flatten()[:4].tolist() for model in models]
        assert len(set(map(tuple, first))) == len(models)


def test_a_seed_that_is_set_again_gives_the_same_own_init_again() -> None:
    weights = []
    for _ in range(2):
        model = built(FABRIC)
        FABRIC.init_missing(model)
        weights.append(model[0].weight)
    assert torch.equal(*weights)


def test_own_init_moves_torchs_generator_on_once() -> None:
    model = built(FABRIC)
    before = torch.get_rng_state()
    FABRIC.init_missing(model)
    after = torch.get_rng_state()
    assert not torch.equal(after, before)
    FABRIC.init_missing(model)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("skips_init", [False, True])
def test_a_block_in_which_nothing_draws_leaves_torchs_generator_where_it_was(skips_init: bool) -> None:
    before = torch.get_rng_state()
    with FABRIC.init_module(empty_init=True) if skips_init else deferred_init():
        model = nn.LayerNorm(3)
    assert torch.equal(torch.get_rng_state(), before)
    FABRIC.init_missing(model)
    assert torch.equal(torch.get_rng_state(), before)
