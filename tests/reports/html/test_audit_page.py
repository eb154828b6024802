"""The page of an audit: what is wrong first, then the plots, then every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fabric_init.reports.html import Page
from fabric_init.tools.audit.page import audit_page
from tests.reports.html.audits import MODEL, bad_audit, clean_audit


@pytest.fixture(scope="module")
def page() -> Page:
    return audit_page(bad_audit())


def traces(page: Page, title: str) -> dict[str, Any]:
    (plot,) = [plot for plot in page.plots if plot.title == title]
    return {trace.get("name", ""): trace for trace in plot.figure["data"]}


def row(page: Page, name: str) -> dict[str, Any]:
    (found,) = [row for row in page.table.rows if str(row[0]).partition(",")[0] == name]
    return {column.title: cell for column, cell in zip(page.table.columns, found, strict=True)}


def test_findings_keep_their_order_and_say_level_evidence_fix_and_both_losses(page: Page) -> None:
    assert [card.level for card in page.cards] == ["error", "error", "warning", "note"]
    first = page.cards[0]
    assert (first.title, list(first.about)) == ("first loss", ["lm_head.weight"])
    assert first.text.endswith("First loss: 179.3 as it is, 10.6 once fixed.")
    assert "std=0.0442" in first.fix


def test_the_facts_count_findings_and_waste(page: Page) -> None:
    facts = {fact.label: (fact.value, fact.level) for fact in page.facts}
    assert facts["errors"] == ("2", "error")
    assert facts["warning"] == ("1", "warning")
    assert facts["elements of dead writes"] == ("39.2 M", "warning")
    assert facts["first loss"] == ("179.3", None)


def test_variance_is_drawn_layer_by_layer(page: Page) -> None:
    found = traces(page, "Variance by layer")
    assert found["activations"]["y"][:2] == [1.0, 1.6]
    assert found["gradients"]["y"][5] is None, "zero has no logarithm"
    assert found["activations"]["customdata"][1] == "encoder.block.0.layer.1 (T5Block)"


def test_a_head_that_is_far_too_wide_lies_far_above_the_line(page: Page) -> None:
    points = traces(page, "Std by tensor against expectation")["normal_"]
    by_name = dict(zip(points["customdata"], zip(points["x"], points["y"], strict=True), strict=True))
    (head,) = [spot for text, spot in by_name.items() if "shared.weight" in text]
    assert head == (pytest.approx(512**-0.5), 1.0)
    assert any(f"normal_(std=1) at {MODEL}:40" in text for text in by_name)


def test_waste_is_added_up_by_rule_and_line(page: Page) -> None:
    (bar,) = traces(page, "Dead writes").values()
    assert bar["x"] == [bad_audit().wasted_elements]
    assert bar["customdata"] == [f"kaiming_uniform_(a=2.23607) at {MODEL}:12<br>shared.weight and 33 more"]


def test_a_row_has_its_rule_its_line_its_waste_and_its_worst_finding(page: Page) -> None:
    head = row(page, "lm_head.weight")
    assert (head["finding"], head["rule"], head["line"]) == ("error", "normal_(std=1)", f"{MODEL}:40")
    assert (head["std expected"], head["full writes"], head["wasted"]) == (1.0, 2, 32128 * 512)
    assert head["writes"] == [
        f"kaiming_uniform_(a=2.23607) at {MODEL}:12, overwritten before being read",
        f"normal_(std=1) at {MODEL}:40",
    ]
    assert row(page, "shared.weight")["tensor"] == "shared.weight, encoder.embed_tokens.weight"
    assert row(page, "encoder.block.0.layer.0.layer_norm.weight")["finding"] is None
    assert row(page, "bias")["rule"] == ""


def test_where_nothing_was_found_the_page_says_so_and_draws_nothing() -> None:
    page = audit_page(clean_audit())
    assert [(card.level, card.title) for card in page.cards] == [("good", "Nothing found")]
    assert page.plots == []


def test_the_suffix_decides_what_is_saved(tmp_path: Path) -> None:
    for name in ("audit.html", "audit.HTM"):
        bad_audit().save(tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<!doctype html>")
    bad_audit().save(tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == bad_audit().to_dict()
