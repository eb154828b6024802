"""A model of every kind of tensor, and checkpoints for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Save = Callable[..., Path]


class Model(nn.Module):
    """Eight tensors in its state dict, one of them under two names, and a buffer that is not in it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a checkpoint of the model, changed by keyword: a tensor, or ``None`` to leave the key out."""

    def write(changes: dict[str, Tensor | None] | None = None, dtype: torch.dtype = torch.float32) -> Path:
        state = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in Model().state_dict().items()
        }
        changed = {**state, **(changes or {})}
        path = tmp_path / "model.safetensors"
        save_file({name: value.clone() for name, value in changed.items() if value is not None}, path)
        return path

    return write


@pytest.fixture
def build() -> Callable[[], nn.Module]:
    return Model
