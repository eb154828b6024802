"""Mean and standard deviation: of elements that arrive in pieces, and of the result of an init rule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS, Func

_PIECE = 1 << 22


class Moments(NamedTuple):
    """Mean and standard deviation over the elements of a tensor."""

    mean: float
    std: float

    def scaled(self, factor: float, offset: float = 0.0) -> Moments:
        """Return the moments of ``factor · x + offset``."""
        return Moments(self.mean * factor + offset, self.std * abs(factor))


@dataclass
class RunningMoments:
    """Mean and variance of elements that arrive in pieces.

    Pieces are merged by the pairwise formula of Chan, Golub and LeVeque, "Updating formulae" (1979).

    Attributes:
        count: the number of elements so far.
        mean: their mean.
        var: their variance about that mean (not the unbiased estimate).
    """

    count: int = 0
    mean: float = 0.0
    var: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Add the elements of a floating point tensor, computed in its own dtype."""
        if values.numel():
            var, mean = torch.var_mean(values, correction=0)
            self.merge(values.numel(), float(mean), float(var))

    def merge(self, count: int, mean: float, var: float) -> None:
        """Add ``count`` elements of this mean and variance."""
        total, apart = self.count + count, mean - self.mean
        within = (self.count * self.var + count * var) / total
        self.var = within + apart * apart * (self.count / total) * (count / total)
        self.mean += apart * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.var)


def mixture(parts: Sequence[tuple[float, Moments]]) -> Moments:
    """Return the moments of a tensor that consists of parts: pairs of element count and moments."""
    total = sum(weight for weight, _ in parts)
    mean = sum(weight * part.mean for weight, part in parts) / total
    var = sum(weight * (part.std**2 + (part.mean - mean) ** 2) for weight, part in parts) / total
    return Moments(mean, math.sqrt(var))


def measured(tensor: torch.Tensor) -> Moments | None:
    """Return the moments of the elements of a tensor in double precision, computed in pieces of bounded memory.

    Returns:
        ``None`` for tensors without elements or memory, complex tensors, and layouts that are not strided.
    """
    if tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided or not tensor.numel():
        return None
    running = RunningMoments()
    for piece in tensor.detach().flatten().split(_PIECE):
        running.add(piece.double())
    return Moments(running.mean, running.std)


def of_init_function(func: Func, size: torch.Size, arguments: dict[str, Any]) -> Moments:
    """Return the moments of a tensor of this size after a ``torch.nn.init`` function."""
    return _RULES[func.__name__](size, {**_defaults(func), **arguments})


@cache
def _defaults(func: Func) -> dict[str, Any]:
    parameters = inspect.signature(func).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}


def uniform(low: float, high: float) -> Moments:
    """Return the moments of a uniform distribution."""
    return Moments((low + high) / 2, abs(high - low) / math.sqrt(12))


def truncated_normal(mean: float, std: float, low: float, high: float) -> Moments:
    """Return the moments of a normal distribution truncated to ``low … high``.

    See Johnson, Kotz, Balakrishnan: Continuous Univariate Distributions.
    """
    if std == 0:
        return Moments(mean, 0.0)
    a, b = (low - mean) / std, (high - mean) / std
    mass = _normal_cdf(b) - _normal_cdf(a)
    if mass < 1e-12:  # far out in one tail: nearly all of the mass is at the bound nearest to the mean
        return Moments(low if abs(a) < abs(b) else high, 0.0)
    shift = (_normal_pdf(a) - _normal_pdf(b)) / mass
    variance = 1 + (a * _normal_pdf(a) - b * _normal_pdf(b)) / mass - shift**2
    return Moments(mean + std * shift, std * math.sqrt(max(variance, 0.0)))


def _normal_pdf(x: float) -> float:
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def _normal_cdf(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _fans(size: torch.Size) -> tuple[int, int]:
    if len(size) < 2:
        return max(size.numel(), 1), max(size.numel(), 1)
    field = math.prod(size[2:])
    return size[1] * field, size[0] * field


def _xavier(size: torch.Size, arguments: dict[str, Any]) -> Moments:
    return Moments(0.0, float(arguments["gain"]) * math.sqrt(2 / sum(_fans(size))))


def _kaiming(size: torch.Size, arguments: dict[str, Any]) -> Moments:
    fan_in, fan_out = _fans(size)
    gain = nn.init.calculate_gain(arguments["nonlinearity"], arguments["a"])
    return Moments(0.0, gain / math.sqrt(fan_in if arguments["mode"] == "fan_in" else fan_out))


def _ones_among_zeros(ones: float, elements: int) -> Moments:
    return mixture([(ones, Moments(1.0, 0.0)), (elements - ones, Moments(0.0, 0.0))])


def _dirac(size: torch.Size, arguments: dict[str, Any]) -> Moments:
    groups = int(arguments["groups"])
    return _ones_among_zeros(groups * min(size[0] // groups, size[1]), size.numel())


def _orthogonal(size: torch.Size, arguments: dict[str, Any]) -> Moments:
    return Moments(0.0, float(arguments["gain"]) / math.sqrt(max(size[0], math.prod(size[1:]))))


def _sparse(size: torch.Size, arguments: dict[str, Any]) -> Moments:
    zeros = math.ceil(float(arguments["sparsity"]) * size[0])
    return Moments(0.0, float(arguments["std"]) * math.sqrt(1 - zeros / size[0]))


_RULES: dict[str, Callable[[torch.Size, dict[str, Any]], Moments]] = {
    "uniform_": lambda size, arguments: uniform(arguments["a"], arguments["b"]),
    "normal_": lambda size, arguments: Moments(float(arguments["mean"]), float(arguments["std"])),
    "trunc_normal_": lambda size, arguments: truncated_normal(
        arguments["mean"], arguments["std"], arguments["a"], arguments["b"]
    ),
    "constant_": lambda size, arguments: Moments(float(arguments["val"]), 0.0),
    "ones_": lambda size, arguments: Moments(1.0, 0.0),
    "zeros_": lambda size, arguments: Moments(0.0, 0.0),
    "eye_": lambda size, arguments: _ones_among_zeros(min(size), size.numel()),
    "dirac_": _dirac,
    "xavier_uniform_": _xavier,
    "xavier_normal_": _xavier,
    "kaiming_uniform_": _kaiming,
    "kaiming_normal_": _kaiming,
    "orthogonal_": _orthogonal,
    "sparse_": _sparse,
}
assert _RULES.keys() == INIT_FUNCTIONS.keys()
