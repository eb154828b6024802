"""Small models whose init is wrong in one known way each; ``line_of`` tells which line did it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

WIDTH = 16
FILE = Path(__file__)


def line_of(mark: str) -> int:
    """The number of the line of this file that ends in ``# mark``."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def init_linears(module: nn.Module) -> None:
    """The model's own rule."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            nn.init.normal_(one.weight, std=0.02)  # the general rule
            nn.init.zeros_(one.bias)


class Block(nn.Module):
    def __init__(self, *, own_init: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        if own_init:
            init_linears(self)


class Plain(nn.Module):
    """Nothing wrong: every layer by one rule, called once, with an exception for the output projections."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        init_linears(self)
        nn.init.trunc_normal_(self.token, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.down.weight, std=0.02 / 6**0.5)  # the exception


class ThreeLevels(nn.Module):
    """What transformers #21431 is about: every level initializes all that is below it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Body()
        init_linears(self)


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(own_init=True) for _ in range(2))
        init_linears(self)


class Undone(nn.Module):
    """A layer that its parent initializes on purpose, and a general rule that comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        nn.init.xavier_uniform_(self.project.weight)  # the special rule
        self.block = Block()
        init_linears(self)


class Unwritten(nn.Module):
    """One parameter that nobody writes, one of which a row is left, and a buffer that is scratch room."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(WIDTH))
        self.table = nn.Parameter(torch.empty(4, WIDTH))
        self.fine = nn.Parameter(torch.empty(4, WIDTH))
        self.register_buffer("scratch", torch.empty(8), persistent=False)
        with torch.no_grad():
            self.table[:3].normal_(std=0.5)
            for row in self.fine:
                row.normal_(std=0.5)


class Forgotten(nn.Module):
    """One block of three is not initialized by the model's rule, and one class never is."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)
        for block in self.blocks[:2]:  # type: ignore[attr-defined]
            init_linears(block)


class ZeroedHead(nn.Module):
    """Torch's own init, but for the last layer: meant, and nothing to say of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        nn.init.zeros_(self.blocks[3].weight)  # type: ignore[arg-type]


class DepthScaled(nn.Module):
    """One line, another standard deviation for each layer: one rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        for depth, layer in enumerate(self.layers, 1):
            nn.init.normal_(layer.weight, std=0.02 / depth**0.5)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, 10, bias=False)
        self.head.weight = self.embed.weight
