"""A page with everything on it that a page can have, some of it hostile."""

from __future__ import annotations

import math

from fabric_init.reports.html import Bar, Card, Column, Fact, Page, Point, Table, bars, lines, scatter

HOSTILE = "</script><img src=x onerror=document.title='owned'>{{ 7*7 }}"
ROWS = 700
COLUMNS = (
    Column("name", "code"),
    Column("status", "choice"),
    Column("std", "number", "what it is now"),
    Column("bytes", "bytes"),
    Column("cost", "seconds"),
    Column("writes", "list"),
)


def example_page() -> Page:
    stds = [math.nan, None, *(0.001 * i for i in range(ROWS - 3)), math.inf]
    rows = [
        (
            HOSTILE if i == 7 else f"layers.{i}.weight",
            "loaded" if i % 3 else "initialized",
            std,
            1000 * i,
            1e-6 * i,
            [f"normal_(std={j}) at model.py:{j}" for j in range(i % 4)],
        )
        for i, std in enumerate(stds)
    ]
    layers = [f"block.{i}" for i in range(12)]
    growing: dict[str, list[float | None]] = {
        "activations": [10.0**i for i in range(12)],
        "gradients": [None if i == 4 else 10.0**-i for i in range(12)],
    }
    points = [Point(0.01 * (i % 5 + 1), 0.0101 * (i % 5 + 1), f"rule {i % 5}", f"layers.{i}") for i in range(200)]
    return Page(
        title=f"Example {HOSTILE}",
        subtitle=HOSTILE,
        table=Table(COLUMNS, rows),
        facts=[Fact("700", "tensors"), Fact("1", "error", "error")],
        cards=[
            Card("error", "no good", [HOSTILE, *layers], "seen: " + HOSTILE, "fix it"),
            Card("warning", "two rules"),
            Card("note", "by the way"),
        ],
        plots=[
            lines("Variance by layer", "Flat is good.", layers, growing, "variance"),
            scatter("Std against expectation", HOSTILE, points, "expected std", "std now"),
            bars("Dead writes", "By rule.", [Bar(HOSTILE, 5e6), Bar("zeros_() at a.py:1", 2e6)], "elements"),
        ],
    )
