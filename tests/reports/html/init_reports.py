"""An init report with everything that a page of one can show."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fabric_init import InitReport, deferred_init, materialize


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 100, bias=False)
        self.head.weight = self.embedding.weight
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.xavier_uniform_(self.layers[0].weight)


def mixed_report(folder: Path) -> tuple[InitReport, nn.Module]:
    """Loaded in part, with a cast, a tie and a key too many; then NaN is written into what was loaded."""
    torch.manual_seed(0)
    state = {key: value for key, value in Model().state_dict().items() if not key.startswith("layers")}
    torch.save(state | {"norm.weight": state["norm.weight"].bfloat16(), "more": torch.ones(1)}, folder / "m.pt")
    with deferred_init():
        model = Model()
    report = materialize(model, checkpoint=folder / "m.pt", strict=False)
    with torch.no_grad():
        model.norm.bias[3] = float("nan")
    return report.measure(), model
