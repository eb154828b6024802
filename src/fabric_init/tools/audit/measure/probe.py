"""Run one forward and backward pass of a freshly initialized model, and check what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fabric_init.errors import FabricInitError
from fabric_init.tools.audit.batch import Call, as_call
from fabric_init.tools.audit.checks.loss_findings import loss_findings
from fabric_init.tools.audit.checks.signal import flow_findings
from fabric_init.tools.audit.dummy_batch import dummy_batch
from fabric_init.tools.audit.findings import AuditRow, Finding, Layer
from fabric_init.tools.audit.measure.activations import first_floating, watched
from fabric_init.tools.audit.measure.filled_copy import with_values
from fabric_init.tools.audit.measure.first_loss import Outcome, outcome_of
from fabric_init.tools.audit.measure.std_search import scaled, suspects
from fabric_init.tools.audit.preserve_state import untouched

_SEED = 2


def examine(
    model: nn.Module, rows: Sequence[AuditRow], batch: Any = "auto"
) -> tuple[tuple[Layer, ...], float | None, float | None, tuple[Finding, ...]]:
    """Run ``model`` forward and backward once, and check activations, gradients and the loss.

    The model stays as it was: a recorded one stays recorded (a copy is filled and run, which takes the model's
    memory); of one with values, buffers, gradients, modes and torch's generators are the same afterwards.

    Args:
        model: recorded, or with values.
        rows: the audited rows of its tensors; may be empty.
        batch: a tensor, a tuple of ``forward``'s arguments with the labels as one more, or a mapping from argument
            name to tensor. ``"auto"`` generates one if the model declares its inputs.

    Returns:
        The layers, in the order of the forward pass; the first loss; ln(classes) where the loss is a cross-entropy;
        the findings, first losses first.

    Raises:
        FabricInitError: no batch can be generated, the model does not take the batch, or it cannot be copied.
        UninitializedTensorError: the model's own code does not initialize some tensor.
    """
    if isinstance(batch, str) and batch == "auto":
        batch = dummy_batch(model)
    model = with_values(model)
    call = as_call(model, batch, _device_of(model))
    with untouched(model):
        with _on_this_batch(model, call), watched(model) as flows:
            output = model(*call.args, **call.kwargs)
            outcome = outcome_of(model, call, output)
            candidates = suspects(model, _backward(model, outcome, output))
            del output
        outcome = outcome.released()
        findings = loss_findings(rows, outcome, candidates, lambda factors: _loss_with(model, call, factors))
        findings += flow_findings(flows)
    return tuple(flow.layer() for flow in flows), outcome.first_loss, outcome.expected, tuple(findings)


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@contextmanager
def _on_this_batch(model: nn.Module, call: Call) -> Iterator[None]:
    """Add the shapes of the batch to whatever the model raises."""
    try:
        yield
    except Exception as error:
        shapes = ", ".join(f"{name}: {_shape(value)}" for name, value in [*enumerate(call.args), *call.kwargs.items()])
        raise FabricInitError(
            f"{type(model).__name__} does not run on the batch ({shapes}): {type(error).__name__}: {error}. "
            "Pass a batch that it takes: audit(model, batch=…)."
        ) from error


def _shape(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _backward(model: nn.Module, outcome: Outcome, output: Any) -> dict[str, Tensor | None]:
    """Gradients of the loss by parameter name, without touching the parameters' own; of a model without a loss, those
    of a random direction of its output."""
    start = outcome.loss
    if start is None and (features := first_floating(output)) is not None:
        generator = torch.Generator().manual_seed(_SEED)
        direction = torch.randn(features.shape, generator=generator).to(features)
        start = (features * direction).mean()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if start is None or not start.requires_grad or not named:
        return {}
    gradients = torch.autograd.grad(start, [parameter for _, parameter in named], allow_unused=True)
    return {name: gradient for (name, _), gradient in zip(named, gradients, strict=True)}


def _loss_with(model: nn.Module, call: Call, factors: Mapping[str, float]) -> float:
    with torch.no_grad():
        loss = outcome_of(model, call, functional_call(model, scaled(model, factors), call.args, call.kwargs)).loss
    return math.nan if loss is None else float(loss)
