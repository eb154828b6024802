"""The model of the examples, with every part that a rank may build otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x))[..., :-1]


class Net(nn.Module):
    """Some layers in a list, a buffer that is saved, one that is not, an init of its own.

    Args:
        width: Of the layers.
        std: Of the head.
        constant: In the buffers.
        dtype: Of the head.
        extra: Whether there is one more parameter.
        foreign: Whether the head is drawn from numpy, which has no seed.
        reverse: Whether the head is made last.
    """

    def __init__(
        self,
        *,
        width: int = 6,
        std: float = 0.02,
        constant: float = 10.0,
        dtype: torch.dtype = torch.float32,
        extra: bool = False,
        foreign: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        make: dict[str, Callable[[], nn.Module]] = {
            "layers": lambda: nn.ModuleList(Layer(width) for _ in range(3)),
            "head": lambda: nn.Linear(width, 5, bias=False, dtype=dtype),
        }
        for name in sorted(make, reverse=reverse):
            self.add_module(name, make[name]())
        nn.init.normal_(self.head.weight, std=std)
        if foreign:
            with torch.no_grad():
                self.head.weight[1:3] = torch.from_numpy(numpy.random.default_rng().normal(size=(2, width)))
        self.scale = nn.Parameter(torch.full((width,), constant))
        self.register_buffer("frequencies", torch.arange(width) / constant, persistent=False)
        self.register_buffer("steps", torch.full((2,), constant))
        if extra:
            self.more = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head((x * self.scale + self.frequencies).to(self.head.weight.dtype)) + self.steps.sum()


OTHERWISE: Mapping[str, dict[str, Any]] = {
    "shape": {"width": 7},
    "init": {"std": 0.03},
    "constants": {"constant": 11.0},
    "dtype": {"dtype": torch.bfloat16},
    "one more parameter": {"extra": True},
    "numpy": {"foreign": True},
    "order": {"reverse": True},
}
"""What one rank may build otherwise."""


def values(seed: int) -> dict[str, Tensor]:
    """Values that no init would give."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(t.shape, generator=generator) for name, t in Net().state_dict().items()}
