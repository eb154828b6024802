"""What is drawn: the numbers that go into each figure."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fabric_init.reports.html import Bar, Plot, Point, bars, lines, scatter


def traces(plot: Plot) -> dict[str, Any]:
    return {trace.get("name", ""): trace for trace in plot.figure["data"]}


def test_lines_leave_a_gap_where_a_logarithm_has_no_value() -> None:
    values = [1.0, 0.0, None, math.nan, math.inf, -1.0, 2.0]
    plot = lines("t", "n", [f"layer {i}" for i in range(7)], {"activations": values}, "variance")
    assert traces(plot)["activations"]["y"] == [1.0, None, None, None, None, None, 2.0]
    assert plot.figure["layout"]["yaxis"]["type"] == "log"


def test_points_on_one_spot_become_one_that_counts_them() -> None:
    points = [Point(0.02, 0.02 * (1 + 1e-4 * i), "normal_", f"w{i}", "at a.py:1") for i in range(100)]
    trace = traces(scatter("t", "n", [*points, Point(0.02, 1.0, "normal_", "far")], "x", "y"))["normal_"]
    assert len(trace["x"]) == 2
    assert trace["customdata"][0] == "<b>w0</b><br>at a.py:1<br>w1<br>w2<br>w3<br>and 96 more"
    assert trace["customdata"][1] == "<b>far</b>"
    sizes = trace["marker"]["size"]
    assert sizes[0] > sizes[1]


def test_the_line_of_equals_spans_all_points() -> None:
    equal = traces(scatter("t", "n", [Point(0.01, 3.0, "a", "w"), Point(2.0, 0.5, "b", "v")], "x", "y"))["equal"]
    assert equal["x"] == equal["y"] == [0.005, 6.0]


def test_only_the_largest_groups_have_a_color_of_their_own() -> None:
    points = [Point(1.0 + i, 1.0, f"rule {i}", f"w{i}.{j}") for i in range(20) for j in range(20 - i)]
    found = traces(scatter("t", "n", points, "x", "y"))
    assert list(found) == ["equal", *(f"rule {i}" for i in range(7)), "others"]


def test_bars_are_sorted_and_what_is_over_shares_one() -> None:
    plot = bars("t", "n", [Bar(f"rule {i}", float(i)) for i in range(30)], "elements")
    (trace,) = plot.figure["data"]
    assert trace["x"] == [*(float(i) for i in range(29, 17, -1)), float(sum(range(18)))]
    assert [note["text"] for note in plot.figure["layout"]["annotations"]][-1] == "18 others"


def test_bars_too_short_to_be_seen_share_one() -> None:
    plot = bars("t", "n", [Bar("much", 1e6), Bar("little", 10.0), Bar("less", 5.0)], "elements")
    assert plot.figure["data"][0]["x"] == [1e6, 15.0]
    assert [note["text"] for note in plot.figure["layout"]["annotations"]] == ["much", "2 others"]


def test_a_short_bar_that_is_alone_keeps_its_name() -> None:
    plot = bars("t", "n", [Bar("loaded", 1e6), Bar("initialized", 1.0)], "bytes")
    assert plot.figure["data"][0]["x"] == [1e6, 1.0]
    assert [note["text"] for note in plot.figure["layout"]["annotations"]] == ["loaded", "initialized"]


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("kaiming_uniform_(a=2.23607) at far/far/away/linear.py:7", "kaiming_uniform_(a=2.23607) at linear.py:7"),
        ("a" * 50 + "z" * 50, "a" * 24 + "…" + "z" * 25),
        ("zeros_() at here/a.py:1", "zeros_() at here/a.py:1"),
    ],
)
def test_long_labels_lose_folders_first_and_keep_both_ends(label: str, shown: str) -> None:
    (note,) = bars("t", "n", [Bar(label, 1.0)], "elements").figure["layout"]["annotations"]
    assert note["text"] == shown


def test_names_cannot_be_markup_of_the_plotting_code() -> None:
    plot = scatter("t", "n", [Point(1.0, 1.0, "<b>", '<a href="https://x">')], "x", "y")
    assert list(traces(plot)) == ["equal", "&lt;b&gt;"]
    assert traces(plot)["&lt;b&gt;"]["customdata"] == ["<b>&lt;a href=&quot;https://x&quot;&gt;</b>"]


def test_plots_of_nothing_are_plots() -> None:
    assert lines("t", "n", [], {"activations": []}, "v").figure["data"][0]["y"] == []
    assert scatter("t", "n", [], "x", "y").figure["data"] == []
    assert bars("t", "n", [], "x").figure["data"][0]["x"] == []
