"""Measure one pass through a model: the moments of the output of every module and of its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from fabric_init.reports.statistics import RunningMoments
from fabric_init.tools.audit.findings import Layer

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold)


@dataclass
class ActivationMoments(RunningMoments):
    """Mean and variance over all elements of several tensors.

    Attributes:
        broken: a NaN or positive infinity was among them; masks may hold negative infinity.
    """

    broken: bool = False

    def add(self, values: Tensor) -> None:
        """Add a floating point tensor of any shape; half precision is summed in float32."""
        values = values.detach()
        super().add(values.float() if values.dtype.itemsize < 4 else values)
        if not math.isfinite(self.var) and not self.broken:
            self.broken = bool((values.isnan() | (values == math.inf)).any())

    @property
    def known(self) -> bool:
        """Whether any element was measured."""
        return self.count > 0

    @property
    def rms(self) -> float:
        """The root mean square."""
        return math.sqrt(self.mean**2 + self.var)


@dataclass
class Flow:
    """One module in one pass: its output, and the gradient of the loss by that output.

    Attributes:
        name: the name of the module in the model.
        module_class: its class.
        leaf: it has no submodules.
        activation: moments of its first floating point output, over all calls.
        gradient: moments of the gradient of the loss by that output.
        dead: for a rectifier, the share of outputs that were zero for every sample of the batch; else ``None``.
    """

    name: str
    module_class: str
    leaf: bool
    activation: ActivationMoments = field(default_factory=ActivationMoments)
    gradient: ActivationMoments = field(default_factory=ActivationMoments)
    dead: float | None = None

    def layer(self) -> Layer:
        """Return the moments as a row of the report."""
        out, back = self.activation, self.gradient
        return Layer(
            self.name,
            self.module_class,
            out.mean if out.known else None,
            out.var if out.known else None,
            back.mean if back.known else None,
            back.var if back.known else None,
        )


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Flow]]:
    """Measure the modules that run in this block; the list is filled in the order of the forward pass."""
    flows: list[Flow] = []
    seen: dict[str, Flow] = {}
    hooks = []

    def measure(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_floating(output)
        if tensor is None:
            return
        flow = seen.get(name)
        if flow is None:
            flow = seen[name] = Flow(name, type(module).__name__, not any(True for _ in module.children()))
            flows.append(flow)
        flow.activation.add(tensor)
        if isinstance(module, _RECTIFIERS) and tensor.dim() > 1:
            flow.dead = float((tensor.detach() == 0).all(dim=0).float().mean())
        if tensor.requires_grad:
            tensor.register_hook(flow.gradient.add)

    try:
        for name, module in model.named_modules():
            if module is not model:
                hooks.append(module.register_forward_hook(partial(measure, name)))
        yield flows
    finally:
        for hook in hooks:
            hook.remove()


def first_floating(output: Any) -> Tensor | None:
    """Return the first floating point tensor of an output that is a tensor, tuple, list or dict."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, (tuple, list)):
        return next((tensor for item in output if (tensor := first_floating(item)) is not None), None)
    return first_floating(list(output.values())) if isinstance(output, dict) else None
