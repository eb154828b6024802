"""Which tensor makes the first loss what it is, and which std would bring it right: proposed, applied and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.planning.tensors import named_modules

WITHIN = 0.1
"""A trial has brought the loss right when it is within this share of ln(classes)."""
_OVERSIZED = 2.0
_SHARE = 0.1
_HALVINGS, _BISECTIONS = 20, 5


class Suspect(NamedTuple):
    """A weight that may be too large.

    Attributes:
        names: in the model; of a tied one, first that under which it is multiplied with.
        std: of its values.
        fan_in: how many inputs one of its outputs sums over; 1 for a table that is only looked up.
        pull: how much the first loss falls for each share by which the tensor is scaled down: the scalar product of the
            tensor and its gradient.
        position: in module order.
    """

    names: tuple[str, ...]
    std: float
    fan_in: int
    pull: float
    position: int

    @property
    def name(self) -> str:
        """The one that counts."""
        return self.names[0]

    @property
    def proposed(self) -> float:
        """The std that keeps the variance of what goes through: 1 / sqrt(fan_in) (LeCun et al., Efficient BackProp)."""
        return 1 / math.sqrt(self.fan_in)

    @property
    def excess(self) -> float:
        """How many times larger than that it is."""
        return self.std / self.proposed


class Trial(NamedTuple):
    """What was tried: each tensor's new std, and the loss with all of them applied."""

    stds: Mapping[str, float]
    loss: float
    right: bool


def suspects(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> list[Suspect]:
    """Every matrix of ``model`` by which the loss can be lowered, with what tells whether it should be.

    Args:
        model: with values.
        gradients: of the first loss, by the first name of each parameter.
    """
    fans: dict[int, dict[str, int]] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and parameter.numel() > 1:
                whole = f"{prefix}.{name}" if prefix else name
                fans.setdefault(id(parameter), {})[whole] = _fan_in(module, parameter)
    found = []
    for position, (name, parameter) in enumerate(model.named_parameters()):
        gradient = gradients.get(name)
        if gradient is not None and id(parameter) in fans:
            values = parameter.detach().flatten().float()
            pull = float(torch.dot(values, gradient.flatten().float()))  # without a temporary of its size
            if pull > 0:
                by_name = fans[id(parameter)]
                names = sorted(by_name, key=lambda name: -by_name[name])
                found.append(Suspect(tuple(names), float(values.std()), by_name[names[0]], pull, position))
    return found


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return weight.numel() // weight.shape[1]  # inputs first, also in what transformers calls Conv1D
    return weight.numel() // weight.shape[0]


def search(
    candidates: Sequence[Suspect], expected: float, loss_with: Callable[[Mapping[str, float]], float]
) -> Trial | None:
    """Scale tensors down until the first loss is within :data:`WITHIN` of ``expected``.

    First those that are larger than their fan-in allows, to what it allows, the worst first and together with those
    before; then, if that is not yet it, the one nearest to the output by whatever it takes.

    Args:
        candidates: from :func:`suspects`.
        expected: ln(classes).
        loss_with: the first loss with each of some tensors multiplied by a factor.

    Returns:
        The smallest set of tensors that was found; ``None`` without a candidate.
    """
    if not candidates:
        return None
    strongest = max(one.pull for one in candidates)
    pulling = [one for one in candidates if one.pull >= _SHARE * strongest]
    oversized = sorted((one for one in pulling if one.excess > _OVERSIZED), key=lambda one: -one.excess)
    factors: dict[str, float] = {}
    loss = math.inf
    for one in oversized:
        factors[one.name] = 1 / one.excess
        loss = loss_with(factors)
        if _is_right(loss, expected):
            break
    if not _is_right(loss, expected):
        nearest = max(oversized or pulling, key=lambda one: one.position)
        factors, loss = _shrunk(nearest.name, factors, expected, loss_with)
    stds = {one.name: one.std * factors[one.name] for one in candidates if one.name in factors}
    return Trial(stds, loss, _is_right(loss, expected))


def _shrunk(
    name: str, factors: Mapping[str, float], expected: float, loss_with: Callable[[Mapping[str, float]], float]
) -> tuple[dict[str, float], float]:
    """The largest further factor for one tensor that brings the loss right, to a few per cent."""
    start = factors.get(name, 1.0)
    for halving in range(1, _HALVINGS + 1):
        factor = start * 0.5**halving
        loss = loss_with({**factors, name: factor})
        if _is_right(loss, expected):
            break
    else:
        return {**factors, name: factor}, loss
    right, wrong = factor, 2 * factor
    for _ in range(_BISECTIONS):
        middle = math.sqrt(right * wrong)
        tried = loss_with({**factors, name: middle})
        if _is_right(tried, expected):
            right, loss = middle, tried
        else:
            wrong = middle
    return {**factors, name: right}, loss


def _is_right(loss: float, expected: float) -> bool:
    return abs(loss - expected) <= WITHIN * expected


def scaled(model: nn.Module, factors: Mapping[str, float]) -> dict[str, Tensor]:
    """Copies of some parameters, each multiplied by its factor, for :func:`torch.func.functional_call`."""
    with torch.no_grad():
        return {name: model.get_parameter(name) * factor for name, factor in factors.items()}
