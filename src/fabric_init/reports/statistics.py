"""Mean and standard deviation of what an init rule gives, worked out from its arguments and the tensor's shape."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from fabric_init.recording.op_schemas import INIT_FUNCTIONS, Func

_PIECE = 1 << 22


class Moments(NamedTuple):
    """Mean and standard deviation over the elements of a tensor."""

    mean: float
    std: float

    def scaled(self, factor: float, offset: float = 0.0) -> Moments:
        """Of ``factor · x + offset``."""
        return Moments(self.mean * factor + offset, self.std * abs(factor))


def mixture(parts: Sequence[tuple[float, Moments]]) -> Moments:
    """Of a tensor that is put together: pairs of how many elements, and their moments."""
    total = sum(weight for weight, _ in parts)
    mean = sum(weight * one.mean for weight, one in parts) / total
    return Moments(
        mean, math.sqrt(sum(weight * (one.std**2 + (one.mean - mean) ** 2) for weight, one in parts) / total)
    )


def measured(tensor: torch.Tensor) -> Moments | None:
    """Of a real tensor's elements, in double precision, a piece at a time: nothing of the tensor's size is taken.

    ``None`` where there are none: no elements, no memory, complex numbers, formats other than plain dense ones.
    """
    if tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided or not tensor.numel():
        return None
    parts: list[tuple[float, Moments]] = []
    for piece in tensor.detach().flatten().split(_PIECE):
        values = piece.double()
        parts.append((values.numel(), Moments(float(values.mean()), float(values.std(correction=0)))))
    return mixture(parts)


def of_init_function(func: Func, size: torch.Size, given: dict[str, Any]) -> Moments:
    """What a ``torch.nn.init`` function gives a tensor of this size."""
    return _RULES[func.__name__](size, {**_defaults(func), **given})


@cache
def _defaults(func: Func) -> dict[str, Any]:
    parameters = inspect.signature(func).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def uniform(low: float, high: float) -> Moments:
    """Between two bounds."""
    return Moments((low + high) / 2, abs(high - low) / math.sqrt(12))


def truncated_normal(mean: float, std: float, low: float, high: float) -> Moments:
    """Normal, drawn again outside ``low … high``. Johnson, Kotz, Balakrishnan: Continuous Univariate Distributions."""
    if std == 0:
        return Moments(mean, 0.0)
    a, b = (low - mean) / std, (high - mean) / std
    mass = _normal_cdf(b) - _normal_cdf(a)
    if mass < 1e-12:  # so far out in one tail that the bound nearest to the mean has nearly all of it
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


def _xavier(size: torch.Size, given: dict[str, Any]) -> Moments:
    return Moments(0.0, float(given["gain"]) * math.sqrt(2 / sum(_fans(size))))


def _kaiming(size: torch.Size, given: dict[str, Any]) -> Moments:
    fan_in, fan_out = _fans(size)
    gain = nn.init.calculate_gain(given["nonlinearity"], given["a"])
    return Moments(0.0, gain / math.sqrt(fan_in if given["mode"] == "fan_in" else fan_out))


def _ones_among_zeros(ones: float, elements: int) -> Moments:
    return mixture([(ones, Moments(1.0, 0.0)), (elements - ones, Moments(0.0, 0.0))])


def _dirac(size: torch.Size, given: dict[str, Any]) -> Moments:
    groups = int(given["groups"])
    return _ones_among_zeros(groups * min(size[0] // groups, size[1]), size.numel())


def _orthogonal(size: torch.Size, given: dict[str, Any]) -> Moments:
    return Moments(0.0, float(given["gain"]) / math.sqrt(max(size[0], math.prod(size[1:]))))


def _sparse(size: torch.Size, given: dict[str, Any]) -> Moments:
    zeros = math.ceil(float(given["sparsity"]) * size[0])
    return Moments(0.0, float(given["std"]) * math.sqrt(1 - zeros / size[0]))


_RULES: dict[str, Callable[[torch.Size, dict[str, Any]], Moments]] = {
    "uniform_": lambda size, given: uniform(given["a"], given["b"]),
    "normal_": lambda size, given: Moments(float(given["mean"]), float(given["std"])),
    "trunc_normal_": lambda size, given: truncated_normal(given["mean"], given["std"], given["a"], given["b"]),
    "constant_": lambda size, given: Moments(float(given["val"]), 0.0),
    "ones_": lambda size, given: Moments(1.0, 0.0),
    "zeros_": lambda size, given: Moments(0.0, 0.0),
    "eye_": lambda size, given: _ones_among_zeros(min(size), size.numel()),
    "dirac_": _dirac,
    "xavier_uniform_": _xavier,
    "xavier_normal_": _xavier,
    "kaiming_uniform_": _kaiming,
    "kaiming_normal_": _kaiming,
    "orthogonal_": _orthogonal,
    "sparse_": _sparse,
}
assert _RULES.keys() == INIT_FUNCTIONS.keys()
