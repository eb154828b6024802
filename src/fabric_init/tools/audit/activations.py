"""What flows through a model in one pass: moments of every module's output and of its gradient, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.tools.audit.findings import Layer

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold)


@dataclass
class ActivationMoments:
    """Mean and variance over all elements of several tensors, merged by the pairwise formula of Chan et al. (1979).

    Attributes:
        count: elements so far.
        mean: of those.
        var: of those, about their mean (not the sample's unbiased one).
        broken: a NaN or positive infinity was among them; masks may hold negative infinity.
    """

    count: int = 0
    mean: float = 0.0
    var: float = 0.0
    broken: bool = False

    def add(self, tensor: Tensor) -> None:
        """Take in a floating point tensor of any shape. Half precision is summed in float32."""
        added = tensor.numel()
        if added == 0:
            return
        values = tensor.detach()
        if values.dtype.itemsize < 4:
            values = values.float()
        var, mean = (float(value) for value in torch.var_mean(values, correction=0))
        if not math.isfinite(var):
            self.broken |= bool((values.isnan() | (values == math.inf)).any())
        total = self.count + added
        apart = mean - self.mean
        self.var = (self.count * self.var + added * var) / total + apart**2 * self.count * added / total**2
        self.mean += apart * added / total
        self.count = total

    @property
    def known(self) -> bool:
        """Whether there was anything to measure."""
        return self.count > 0

    @property
    def rms(self) -> float:
        """The root mean square."""
        return math.sqrt(self.mean**2 + self.var)


@dataclass
class Flow:
    """One module in one pass: what came out of it, and the gradient that came back.

    Attributes:
        name: the module's name in the model.
        module_class: its class.
        leaf: it has no modules in it.
        activation: moments of its first floating point output, over all calls.
        gradient: moments of the loss's gradient by that output.
        dead: of a rectifier, the share of outputs that were zero for every sample of the batch; else ``None``.
    """

    name: str
    module_class: str
    leaf: bool
    activation: ActivationMoments = field(default_factory=ActivationMoments)
    gradient: ActivationMoments = field(default_factory=ActivationMoments)
    dead: float | None = None

    def layer(self) -> Layer:
        """The same as a row of the report."""
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
    """Measure what runs in this block, forward and backward. The list fills in the order of the forward pass."""
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
    """The first floating point tensor in what a module returned: itself, or in a tuple or mapping."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, (tuple, list)):
        return next((found for item in output if (found := first_floating(item)) is not None), None)
    return first_floating(list(output.values())) if isinstance(output, dict) else None
