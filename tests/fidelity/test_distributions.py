"""Per-op replay draws other numbers than eager init does, from the same distributions.

Seeds are fixed, so nothing here is flaky; the thresholds are such that a wrong distribution (a bound, a gain, a fan, a
repeated stream) fails by orders of magnitude: see the last tests, which check that these checks can fail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fabric_init import deferred_init
from fabric_init.api import materialize

LEAST_P = 1e-3
SHAPE = (160, 240)

RANDOM: dict[str, Callable[[Tensor], object]] = {
    "uniform": lambda t: nn.init.uniform_(t, -0.3, 0.7),
    "normal": lambda t: nn.init.normal_(t, 0.5, 0.2),
    "trunc_normal": lambda t: nn.init.trunc_normal_(t, 0.1, 0.5, a=-0.4, b=0.9),
    "trunc_normal, far tail": lambda t: nn.init.trunc_normal_(t, 0.0, 1.0, a=1.5, b=3.0),
    "xavier_uniform": lambda t: nn.init.xavier_uniform_(t, gain=2.0),
    "xavier_normal": lambda t: nn.init.xavier_normal_(t, gain=0.5),
    "kaiming_uniform": lambda t: nn.init.kaiming_uniform_(t, a=0.2),
    "kaiming_normal": lambda t: nn.init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"),
    "orthogonal": lambda t: nn.init.orthogonal_(t, gain=1.5),
    "sparse": lambda t: nn.init.sparse_(t, 0.3, std=0.05),
    "Tensor.normal_": lambda t: t.data.normal_(1.0, 3.0),
    "Tensor.uniform_": lambda t: t.data.uniform_(2.0, 3.0),
    "Tensor.exponential_": lambda t: t.data.exponential_(2.0),
    "Tensor.cauchy_": lambda t: t.data.cauchy_(),
    "Tensor.log_normal_": lambda t: t.data.log_normal_(0.0, 0.25),
    "randn copied": lambda t: t.data.copy_(torch.randn(SHAPE) * 0.02),
    "rand copied": lambda t: t.data.copy_(torch.rand(SHAPE)),
    "torch.normal copied": lambda t: t.data.copy_(torch.normal(torch.ones(SHAPE), 0.1)),
    "randn_like copied": lambda t: t.data.copy_(torch.randn_like(t)),
}
FIXED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], object]]] = {
    "constant": ((7, 5), lambda t: nn.init.constant_(t, 0.3)),
    "ones": ((7, 5), nn.init.ones_),
    "zeros": ((7, 5), nn.init.zeros_),
    "eye": ((7, 5), nn.init.eye_),
    "dirac": ((4, 6, 3), nn.init.dirac_),
    "dirac, in groups": ((4, 2, 3), lambda t: nn.init.dirac_(t, groups=2)),
}


class Model(nn.Module):
    def __init__(self, init: Callable[[Tensor], object], shape: tuple[int, ...], count: int = 1) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(shape)) for _ in range(count)])
        for weight in self.weights:
            init(weight)


def eager(init: Callable[[Tensor], object], shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return Model(init, shape).weights[0].detach()


def per_op(init: Callable[[Tensor], object], shape: tuple[int, ...] = SHAPE, seed: int = 2) -> Tensor:
    torch.manual_seed(seed)
    with deferred_init(rng="per_op"):
        model = Model(init, shape)
    materialize(model)
    return model.weights[0].detach()


def same_distribution(one: Tensor, other: Tensor) -> float:
    return float(stats.ks_2samp(one.flatten().numpy(), other.flatten().numpy(), method="asymp").pvalue)


def moments_agree(one: Tensor, other: Tensor) -> bool:
    """Means within four standard errors of each other, standard deviations within two in a hundred."""
    error = float(one.std()) * (2 / one.numel()) ** 0.5
    return abs(float(one.mean() - other.mean())) < 4 * error and abs(float(other.std() / one.std()) - 1) < 0.02


@pytest.mark.parametrize("name", RANDOM)
def test_replay_draws_from_the_distribution_that_eager_init_draws_from(name: str) -> None:
    one, other = eager(RANDOM[name]), per_op(RANDOM[name])
    assert not torch.equal(one, other), "two independent samples are needed"
    assert same_distribution(one, other) > LEAST_P
    if name != "Tensor.cauchy_":  # it has neither mean nor standard deviation
        assert moments_agree(one, other), (one.mean(), other.mean(), one.std(), other.std())


@pytest.mark.parametrize("name", FIXED)
def test_rules_without_chance_give_the_very_same_values(name: str) -> None:
    shape, init = FIXED[name]
    assert torch.equal(eager(init, shape), per_op(init, shape))


def test_a_normal_tensor_passes_a_test_against_the_exact_distribution() -> None:
    values = per_op(RANDOM["normal"]).flatten().numpy()
    assert stats.kstest(values, stats.norm(0.5, 0.2).cdf).pvalue > LEAST_P


def test_a_uniform_tensor_passes_a_test_against_the_exact_distribution() -> None:
    values = per_op(RANDOM["uniform"]).flatten().numpy()
    assert stats.kstest(values, stats.uniform(-0.3, 1.0).cdf).pvalue > LEAST_P


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"), [(0.1, 0.5, -0.4, 0.9), (0.0, 1.0, 1.5, 3.0), (3.0, 0.1, 2, 4)]
)
def test_a_truncated_normal_keeps_its_bounds_and_its_shape(mean: float, std: float, low: float, high: float) -> None:
    values = per_op(lambda t: nn.init.trunc_normal_(t, mean, std, a=low, b=high))
    assert low <= float(values.min())
    assert float(values.max()) <= high
    exact = stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
    assert stats.kstest(values.flatten().numpy(), exact.cdf).pvalue > LEAST_P


@pytest.mark.parametrize("shape", [(30, 30), (40, 20), (20, 40), (10, 4, 5)])
def test_an_orthogonal_tensor_has_orthogonal_rows_or_columns(shape: tuple[int, ...]) -> None:
    flat = per_op(lambda t: nn.init.orthogonal_(t, gain=1.5), shape).flatten(1).double()
    small = flat if flat.shape[0] <= flat.shape[1] else flat.t()
    torch.testing.assert_close(small @ small.t(), 2.25 * torch.eye(len(small), dtype=torch.float64), atol=1e-5, rtol=0)


def test_orthogonal_matrices_point_in_all_directions() -> None:
    # Haar measure: an element of a random 8×8 orthogonal matrix, squared, is Beta(1/2, 7/2)
    torch.manual_seed(3)
    with deferred_init(rng="per_op"):
        model = Model(nn.init.orthogonal_, (8, 8), count=400)
    materialize(model)
    squares = torch.stack([weight.detach()[0, 0] ** 2 for weight in model.weights]).numpy()
    assert stats.kstest(squares, stats.beta(0.5, 3.5).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.9])
def test_a_sparse_tensor_has_the_same_number_of_zeros_in_each_column_at_random_rows(sparsity: float) -> None:
    rows, columns = 60, 400
    values = per_op(lambda t: nn.init.sparse_(t, sparsity), (rows, columns))
    zeros = values == 0
    expected = int(np.ceil(sparsity * rows))
    assert zeros.sum(0).tolist() == [expected] * columns
    assert stats.chisquare(zeros.sum(1).numpy()).pvalue > LEAST_P


def test_tensors_of_one_model_are_independent_of_each_other() -> None:
    torch.manual_seed(5)
    with deferred_init(rng="per_op"):
        model = Model(nn.init.normal_, (64, 64), count=12)
    materialize(model)
    correlations = np.corrcoef(torch.stack([weight.detach().flatten() for weight in model.weights]).numpy())
    off_diagonal = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / 64


def test_models_of_two_blocks_or_two_seeds_are_independent() -> None:
    torch.manual_seed(5)
    models = []
    for _ in range(2):
        with deferred_init(rng="per_op"):
            models.append(Model(nn.init.normal_, (64, 64)))
    models.append(Model(nn.init.normal_, (64, 64)))  # eager, right after
    torch.manual_seed(6)
    with deferred_init(rng="per_op"):
        models.append(Model(nn.init.normal_, (64, 64)))
    for model in models[:2] + models[3:]:
        materialize(model)
    correlations = np.corrcoef(torch.stack([model.weights[0].detach().flatten() for model in models]).numpy())
    assert np.abs(correlations[~np.eye(4, dtype=bool)]).max() < 5 / 64


def test_the_rows_of_a_large_tensor_are_independent_of_each_other() -> None:
    values = per_op(nn.init.normal_, (20, 4096)).numpy()
    correlations = np.corrcoef(values)
    assert np.abs(correlations[~np.eye(20, dtype=bool)]).max() < 5 / 64


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda t: nn.init.normal_(t, 0.5, 0.21), id="std off by a twentieth"),
        pytest.param(lambda t: nn.init.normal_(t, 0.51, 0.2), id="mean off by a twentieth of std"),
        pytest.param(lambda t: nn.init.uniform_(t, 0.5 - 0.2 * 3**0.5, 0.5 + 0.2 * 3**0.5), id="same moments, uniform"),
        pytest.param(lambda t: nn.init.trunc_normal_(t, 0.5, 0.2, 0.1, 0.9), id="cut off at two sigma"),
    ],
)
def test_the_checks_above_tell_a_wrong_distribution(wrong: Callable[[Tensor], object]) -> None:
    one, other = eager(RANDOM["normal"]), per_op(wrong)
    assert same_distribution(one, other) < LEAST_P or not moments_agree(one, other)
