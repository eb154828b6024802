"""What is computed from loaded tensors costs the same for each, however many there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fabric_init import deferred_init, materialize
from fabric_init.recording.tape.tape import LoadedStorage, Tape


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("norm", self.weight.detach().norm(dim=1), persistent=False)


def lists_of_loads(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often the loads on a tape are listed while a model is filled, each of which takes time for all."""
    with deferred_init():
        model = nn.Sequential(*(Normed() for _ in range(layers)))
    torch.save({f"{layer}.weight": torch.full((2, 2), float(layer)) for layer in range(layers)}, folder / "model.pt")
    calls, brought = [], Tape.brought

    def counted(tape: Tape) -> dict[int, LoadedStorage]:
        calls.append(tape)
        return dict(brought(tape))

    with monkeypatch.context() as patched:
        patched.setattr(Tape, "brought", counted)
        materialize(model, checkpoint=folder / "model.pt")
    for layer in range(layers):
        module = model[layer]
        assert torch.equal(module.norm, module.weight.detach().norm(dim=1))
    return len(calls)


def test_loads_are_listed_once_for_all_that_is_computed_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lists_of_loads(9, tmp_path, monkeypatch) == lists_of_loads(3, tmp_path, monkeypatch)
