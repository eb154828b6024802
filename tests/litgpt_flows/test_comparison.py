"""What `run.py` says of two runs, without litgpt: its flows need a checkout, and half an hour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.litgpt_flows import run
from tests.litgpt_flows.run import Flow, compare

FLOW = Flow(["finetune_full", "generate"])
Change = Callable[[Path], Any]


def save(folder: Path, weight: torch.Tensor, loss: str = "0.5") -> None:
    """Write what a flow writes."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    torch.save({"model": {"weight": weight}, "step": 2}, folder / "out" / "lit_model.pth")
    (folder / "metrics.csv").write_text(f"step,loss,time\n1,{loss},{folder.name}\n", encoding="utf-8")
    (folder / "said-1").write_text("llamas", encoding="utf-8")


def agree(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Change, reason: str = "") -> bool:
    """Return whether ``compare`` finds a flow the same after ``change`` to what ours has written."""

    def pretend(flow: Flow, kind: str, where: Path, *rest: Path) -> str:
        save(where, torch.ones(3))
        if kind == "ours":
            change(where)
        return reason if kind == "ours" else ""

    monkeypatch.setattr(run, "run", pretend)
    return compare("flow", FLOW, folder, folder, folder)


def test_times_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agree(tmp_path, monkeypatch, lambda ours: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ours: save(ours, torch.tensor([1, 1, 1 + 1e-7])), ""),
        (lambda ours: save(ours, torch.ones(3, dtype=torch.float64)), ""),
        (lambda ours: save(ours, torch.ones(3), loss="0.5000001"), ""),
        (lambda ours: (ours / "out" / "lit_model.pth").unlink(), ""),
        (lambda ours: (ours / "said-1").write_text("alpacas", encoding="utf-8"), ""),
        (lambda ours: None, "generate ended with 1"),
    ],
    ids=["a bit", "a dtype", "a loss", "a file", "a text", "an end"],
)
def test_all_else_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, reason: str) -> None:
    assert not agree(tmp_path, monkeypatch, change, reason)
