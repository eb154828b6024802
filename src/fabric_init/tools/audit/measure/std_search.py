"""Search for the tensors whose std makes the first loss too high, and for the std that fixes it, by measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import ConvTransposeNd
from fabric_init.planning.tensors import named_modules

WITHIN = 0.1
"""A trial fixes the loss if it is within this share of ln(classes)."""
_OVERSIZED = 2.0
_SHARE = 0.1
_HALVINGS, _BISECTIONS = 20, 5


class Suspect(NamedTuple):
    """A weight that may be too large.

    Attributes:
        names: in the model; of a tied weight, the name under which it is multiplied comes first.
        std: the standard deviation of its values.
        fan_in: the number of inputs that an output sums over; 1 for a lookup table.
        pull: the decrease of the first loss when the tensor is scaled down: the scalar product of the tensor and its
            gradient.
        position: in module order.
    """

    names: tuple[str, ...]
    std: float
    fan_in: int
    pull: float
    position: int

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def proposed(self) -> float:
        """The std that preserves the variance: 1 / sqrt(fan_in) (LeCun et al., Efficient BackProp)."""
        return 1 / math.sqrt(self.fan_in)

    @property
    def excess(self) -> float:
        """The ratio of its std to the proposed one."""
        return self.std / self.proposed


class Trial(NamedTuple):
    """The new std of each tensor in a trial, and the loss with all of them applied."""

    stds: Mapping[str, float]
    loss: float
    right: bool


def suspects(model: nn.Module, gradients: Mapping[str, Tensor | None]) -> list[Suspect]:
    """Return every matrix of ``model`` that lowers the loss when it is scaled down.

    Args:
        model: with values.
        gradients: of the first loss, by the first name of each parameter.
    """
    fans: dict[int, dict[str, int]] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and parameter.numel() > 1:
                full_name = f"{prefix}.{name}" if prefix else name
                fans.setdefault(id(parameter), {})[full_name] = _fan_in(module, parameter)
    result = []
    for position, (name, parameter) in enumerate(model.named_parameters()):
        gradient = gradients.get(name)
        if gradient is not None and id(parameter) in fans:
            values = parameter.detach().flatten().float()
            pull = float(torch.dot(values, gradient.flatten().float()))  # needs no temporary of its size
            if pull > 0:
                by_name = fans[id(parameter)]
                names = sorted(by_name, key=lambda name: -by_name[name])
                result.append(Suspect(tuple(names), float(values.std()), by_name[names[0]], pull, position))
    return result


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, ConvTransposeNd) or type(module).__name__ == "Conv1D":
        return weight.numel() // weight.shape[1]  # inputs come first, as in Conv1D of transformers
    return weight.numel() // weight.shape[0]


def search(
    candidates: Sequence[Suspect], expected: float, loss_with: Callable[[Mapping[str, float]], float]
) -> Trial | None:
    """Scale tensors down until the first loss is within :data:`WITHIN` of ``expected``.

    First scale those that are too large for their fan-in to the proposed std, the worst first and cumulatively. If that
    is not enough, scale the one nearest to the output further.

    Args:
        candidates: from :func:`suspects`.
        expected: ln(classes).
        loss_with: the first loss with each of some tensors multiplied by a factor.

    Returns:
        The smallest set of tensors that fixes the loss; ``None`` without candidates.
    """
    if not candidates:
        return None
    strongest = max(suspect.pull for suspect in candidates)
    pulling = [suspect for suspect in candidates if suspect.pull >= _SHARE * strongest]
    too_large = (suspect for suspect in pulling if suspect.excess > _OVERSIZED)
    oversized = sorted(too_large, key=lambda suspect: -suspect.excess)
    factors: dict[str, float] = {}
    loss = math.inf
    for suspect in oversized:
        factors[suspect.name] = 1 / suspect.excess
        loss = loss_with(factors)
        if _is_right(loss, expected):
            break
    if not _is_right(loss, expected):
        nearest = max(oversized or pulling, key=lambda suspect: suspect.position)
        factors, loss = _shrunk(nearest.name, factors, expected, loss_with)
    stds = {suspect.name: suspect.std * factors[suspect.name] for suspect in candidates if suspect.name in factors}
    return Trial(stds, loss, _is_right(loss, expected))


def _shrunk(
    name: str, factors: Mapping[str, float], expected: float, loss_with: Callable[[Mapping[str, float]], float]
) -> tuple[dict[str, float], float]:
    """Return the largest further factor for a tensor that fixes the loss, to a few per cent."""
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
    """Return copies of some parameters times their factors, for :func:`torch.func.functional_call`."""
    with torch.no_grad():
        return {name: model.get_parameter(name) * factor for name, factor in factors.items()}
