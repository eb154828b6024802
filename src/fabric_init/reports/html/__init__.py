"""Self-contained HTML pages: facts, findings, plots and a table, in one file that needs no network."""

from fabric_init.reports.html.page import Card, Column, Fact, Page, Table, in_short
from fabric_init.reports.html.plots import Bar, Plot, Point, bars, check_plotly, lines, scatter

__all__ = [
    "Bar",
    "Card",
    "Column",
    "Fact",
    "Page",
    "Plot",
    "Point",
    "Table",
    "bars",
    "check_plotly",
    "in_short",
    "lines",
    "scatter",
]
