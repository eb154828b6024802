"""What a page's file holds, read without a browser."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fabric_init.reports.html import Column, Page, Table
from tests.reports.html.example import HOSTILE, ROWS, example_page


@pytest.fixture(scope="module")
def text() -> str:
    return example_page().html()


def table_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="table">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_table_is_whole_and_what_json_cannot_say_is_text(text: str) -> None:
    table = table_of(text)
    assert [column["title"] for column in table["columns"]] == ["name", "status", "std", "bytes", "cost", "writes"]
    assert len(table["rows"]) == ROWS
    assert [row[2] for row in table["rows"][:3]] == ["nan", None, 0.0]
    assert table["rows"][3][5] == [f"normal_(std={j}) at model.py:{j}" for j in range(3)]
    assert table["rows"][7][0] == HOSTILE


def test_hostile_text_is_never_markup(text: str) -> None:
    assert "<img" not in text
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;") in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]


def test_the_browser_is_told_to_run_this_script_only_and_to_fetch_nothing(text: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="(.*?)">', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1].partition("; style-src")[0]
    assert len(re.findall("<script>", text)) == 1


def test_the_plotting_code_makes_a_page_of_about_two_megabytes_and_no_more(text: str) -> None:
    assert len(text.encode()) < 2.5e6


def test_the_same_page_is_the_same_file(tmp_path: Path, text: str) -> None:
    example_page().save(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_a_page_needs_nothing_but_a_title_and_a_table_and_shows_no_empty_columns() -> None:
    columns = [Column("name"), Column("std", "number"), Column("writes", "list")]
    text = Page("Title", "", Table(columns, [("w", None, []), ("", 0.0, [])])).html()
    assert [column["title"] for column in table_of(text)["columns"]] == ["name", "std"]
    assert table_of(text)["rows"] == [["w", None], ["", 0.0]]


def test_without_plotly_the_error_names_the_extra() -> None:
    source = (
        "import sys; sys.modules['plotly'] = None\n"
        "from fabric_init.reports.html import Column, Page, Table\n"
        "Page('', '', Table([Column('name')], [])).html()"
    )
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert ran.stderr.splitlines()[-1].startswith(
        "fabric_init.errors.FabricInitError: HTML pages are drawn with Plotly"
    )
    assert 'pip install "fabric-init[html]"' in ran.stderr
