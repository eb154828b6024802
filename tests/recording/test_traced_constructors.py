"""Constructors that trace, script or defer their layers: recorded as they are, or refused by the submodule's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.errors import RecordingError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.turn = torch.eye(3).flip(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) @ self.turn


class Symbolic(nn.Module):
    """Keeps what torch.fx makes of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.fx.symbolic_trace(Inner())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.beta * x)


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_a_module_that_torch_fx_traced_in_a_constructor_has_its_values() -> None:
    torch.manual_seed(0)
    plain = Symbolic()
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = Symbolic()
    materialize(model)
    assert same(model, plain)
    assert torch.equal(model(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_a_module_that_torch_fx_traced_in_a_constructor_is_loaded(fabric: Fabric, tmp_path: Path) -> None:
    plain = Symbolic()
    torch.save(plain.state_dict(), tmp_path / "traced.pt")
    with fabric.init_module(checkpoint=tmp_path / "traced.pt"):
        model = Symbolic()
    assert torch.equal(model(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_functions_called_on_a_proxy_in_a_block_go_into_its_graph() -> None:
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    x, y = (torch.fx.Proxy(graph.placeholder(name), tracer) for name in "xy")
    with deferred_init():
        torch.einsum("zui,zuj->zuij", x, y)
        torch.matmul(x, torch.ones(2))
    assert [node.op for node in graph.nodes if node.op == "call_function"] == ["call_function"] * 2


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(1, 3))])
def test_a_scripted_or_traced_submodule_with_tensors_is_refused_by_name(make, fabric: Fabric) -> None:  # type: ignore[no-untyped-def]
    for block in (deferred_init(), fabric.init_module(empty_init=True)):
        with (
            pytest.raises(RecordingError, match=r"1 \(Swish\) was scripted or traced .*model\.1 = torch\.jit\."),
            block,
        ):
            model = nn.Sequential(nn.Linear(3, 3), make(Swish()))
        del model


def test_a_scripted_submodule_without_tensors_works(fabric: Fabric, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.ReLU()))

    plain = build()
    torch.save(plain.state_dict(), tmp_path / "scripted.pt")
    with fabric.init_module(checkpoint=tmp_path / "scripted.pt"):
        model = build()
    assert torch.equal(model(torch.ones(1, 3)), plain(torch.ones(1, 3)))


def test_a_scripted_submodule_that_had_values_before_the_block_works(fabric: Fabric) -> None:
    scripted = torch.jit.script(Swish())
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(3, 3), scripted)
    fabric.init_missing(model)
    assert model(torch.ones(1, 3)).isfinite().all()


LAZY = {"linear": lambda: nn.LazyLinear(4), "batch norm": lambda: nn.LazyBatchNorm1d()}


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_layer_takes_its_shape_after_the_block_as_in_plain_pytorch(kind: str, fabric: Fabric) -> None:
    trained = nn.Sequential(LAZY[kind]())
    trained(torch.randn(5, 3))
    for load in (True, False):
        with fabric.init_module(empty_init=True):
            model = nn.Sequential(LAZY[kind]())
        if load:
            model.load_state_dict(trained.state_dict())
            assert same(model, trained)
        assert model(torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_layer_cannot_be_planned_for_and_is_refused_by_name(kind: str, fabric: Fabric, tmp_path: Path) -> None:
    trained = nn.Sequential(LAZY[kind]())
    trained(torch.randn(5, 3))
    torch.save(trained.state_dict(), tmp_path / "lazy.pt")
    for strict in (True, False):
        with (
            pytest.raises(RecordingError, match=r"0 \(Lazy\w+\) is lazy: .*Run a batch through it"),
            fabric.init_module(checkpoint=tmp_path / "lazy.pt", strict=strict),
        ):
            model = nn.Sequential(LAZY[kind]())
        del model


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_layer_that_saw_a_batch_in_the_block_is_recorded(kind: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = LAZY[kind]()
        layer(torch.randn(5, 3))
        return layer

    with deferred_init(rng="eager"):
        model = build()
    materialize(model)
    assert same(model, build())


@pytest.mark.parametrize("train", [False, True])
def test_a_forward_through_batch_norm_in_a_constructor_is_recorded(train: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(train)
        model(torch.randn(1, 3, 8, 8))
        return model

    with deferred_init(rng="eager"):
        model = build()
    materialize(model)
    assert same(model, build())
