"""The page of an init report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.reports.html import Page
from fabric_init.reports.html.init_page import init_page


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8, bias=False)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight, std=0.1)


def recording() -> Model:
    with deferred_init():
        return Model()


def titles(page: Page) -> list[str]:
    return [plot.title for plot in page.plots]


def cells(page: Page, name: str) -> dict[str, Any]:
    (found,) = [row for row in page.table.rows if row[0] == name]
    return {column.title: cell for column, cell in zip(page.table.columns, found, strict=True)}


def test_a_row_says_what_it_got_and_what_it_is_now() -> None:
    page = init_page(materialize(_model := recording()).measure())
    found = cells(page, "inner.weight")
    assert found["status"] == "initialized"
    assert found["from"].startswith("normal_(mean=0, std=0.1) at ")
    assert (found["std expected"], found["full writes"], found["wasted"]) == (0.1, 2, 64)
    assert 0.05 < found["std now"] < 0.2
    assert [text.endswith(", overwritten before being read") for text in found["writes"]] == [True, False]
    assert titles(page) == ["Where the values came from", "Std by tensor against expectation", "Writes saved"]


def test_what_was_not_measured_is_not_drawn() -> None:
    assert titles(init_page(materialize(_model := recording()).trace())) == [
        "Where the values came from",
        "Writes saved",
    ]


def test_cards_tell_of_casts_ignored_keys_and_values_that_are_not_finite(tmp_path: Path) -> None:
    state = {key: value.bfloat16() for key, value in Model().state_dict().items()} | {"more": torch.ones(1)}
    state["inner.bias"][0] = float("nan")
    torch.save(state, tmp_path / "m.pt")
    report = materialize(_model := recording(), checkpoint=tmp_path / "m.pt", strict=False).measure()
    found = {card.title: (card.level, list(card.about)) for card in init_page(report).cards}
    assert found == {
        "NaN or infinity in 1 tensor": ("error", ["inner.bias"]),
        "ignored: 1 key of the checkpoint": ("note", ["more"]),
        "cast: 3 tensors, bfloat16 → float32": ("note", []),
    }
    assert str(tmp_path / "m.pt") in init_page(report).subtitle
    assert cells(init_page(report), "inner.bias")["from"] == "inner.bias (cast from bfloat16)"


def test_unfilled_tensors_come_first() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(empty_init=True):
        model = Model()
    page = init_page(fabric.init_report(model))
    assert (page.cards[0].level, len(page.cards[0].about)) == ("error", 3)
    assert ("3", "unfilled", "error") in [(fact.value, fact.label, fact.level) for fact in page.facts]


def test_the_suffix_decides_what_is_saved(tmp_path: Path) -> None:
    report = materialize(_model := recording())
    report.save(tmp_path / "report.html")
    report.save(tmp_path / "report.json")
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "report.json").read_text(encoding="utf-8").startswith("{")
    assert '"std": 0.1' in (tmp_path / "report.json").read_text(encoding="utf-8"), "saving asks the recording"
    assert report.rows[0].std is None, "the report itself stays as it was"


def test_json_needs_no_plotting_library(tmp_path: Path) -> None:
    source = (
        "import sys; sys.modules.update(plotly=None, jinja2=None)\n"
        "from fabric_init import InitReport\n"
        "InitReport().save('r.json')\n"
        "InitReport().save('r.html')\n"
    )
    ran = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "r.json").exists()
    assert 'pip install "fabric-init[html]"' in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "r.html").exists()
