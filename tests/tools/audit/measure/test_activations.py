"""Moments of what flows through a model, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_init.tools.audit.checks.signal import flow_findings
from fabric_init.tools.audit.findings import Level
from fabric_init.tools.audit.measure.activations import ActivationMoments, watched
from tests.tools.audit.networks import Classifier, images_and_labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moments_of_several_tensors_are_those_of_all_their_elements(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 5, generator=generator) + 3, 9 * torch.randn(7, generator=generator)
    parts = [first.to(dtype), second.to(dtype)]
    moments = ActivationMoments()
    for part in parts:
        moments.add(part)
    both = torch.cat([part.flatten() for part in parts]).double()
    assert moments.mean == pytest.approx(float(both.mean()), rel=1e-5)
    assert moments.var == pytest.approx(float(both.var(correction=0)), rel=1e-5)
    assert moments.rms == pytest.approx(float(both.pow(2).mean().sqrt()), rel=1e-5)


def test_every_module_has_its_activations_and_gradients_measured_in_forward_order() -> None:
    model, (inputs, labels) = Classifier(), images_and_labels()
    model.eval()
    with watched(model) as flows:
        nn.functional.cross_entropy(model(inputs), labels).backward()
    assert [flow.name for flow in flows] == ["layers.0", "activation", "dropout", "layers.1", "layers.2"]
    hidden = model.layers[0](inputs).detach()
    assert flows[0].activation.var == pytest.approx(float(hidden.var(correction=0)), rel=1e-4)
    assert flows[1].activation.count == 2 * hidden.numel()  # called twice
    out = model(inputs).detach().requires_grad_()
    nn.functional.cross_entropy(out, labels).backward()
    assert out.grad is not None
    assert flows[-1].gradient.var == pytest.approx(float(out.grad.var(correction=0)), rel=1e-4)


def deep(build: type[nn.Module], std: float, layers: int = 12) -> nn.Module:
    model = nn.Sequential()
    for _ in range(layers):
        linear = nn.Linear(32, 32)
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
        model.extend([linear, build()])
    return model


def checks(model: nn.Module) -> dict[str, Level]:
    with watched(model) as flows:
        model(images_and_labels(32)[0]).square().mean().backward()
    return {finding.check: finding.level for finding in flow_findings(flows)}


def test_activations_that_shrink_or_grow_from_layer_to_layer_are_found() -> None:
    assert "vanishing-activations" in checks(deep(nn.ReLU, std=0.01))
    assert "exploding-activations" in checks(deep(nn.ReLU, std=1.5))
    assert checks(deep(nn.ReLU, std=(2 / 32) ** 0.5)) == {}


def test_gradients_that_shrink_on_the_way_back_are_found() -> None:
    assert checks(deep(nn.Sigmoid, std=32**-0.5, layers=20)) == {"vanishing-gradients": Level.WARNING}


def test_the_first_layer_with_nan_or_infinity_is_an_error() -> None:
    model = deep(nn.ReLU, std=0.2, layers=3)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with watched(model) as flows:
        model(images_and_labels(32)[0])
    (finding,) = flow_findings(flows)
    assert (finding.level, finding.check, finding.tensors) == (Level.ERROR, "not-finite", ("2",))


def test_nan_that_a_mask_takes_back_is_only_noted() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.nan_to_num()

    with watched(model := nn.Sequential(nn.Softmax(dim=-1), Masked())) as flows:
        model(torch.full((2, 3), -torch.inf))
    assert [finding.level for finding in flow_findings(flows)] == [Level.NOTE, Level.NOTE]  # and the output is constant


def test_rectifiers_that_never_fire_are_found() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.constant_(model[0].bias, -100.0)
    assert checks(model)["dead-units"] is Level.WARNING


def test_a_branch_that_starts_closed_is_only_noted() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    assert checks(model) == {"constant-output": Level.NOTE}
