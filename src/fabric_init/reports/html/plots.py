"""Plots by Plotly, which is imported when the first plot is made."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from types import ModuleType
from typing import Any

from fabric_init.errors import FabricInitError

_COLORS = ("#3b82d6", "#e0722e", "#2e9e6b", "#a855c7", "#c9a227", "#d6456e", "#17a2b8", "#7f8794")
_PER_DECADE = 60
_MOST_BARS = 12
_SEEN = 0.005
_MOST_NAMES = 4
_OTHERS = "others"


@dataclass(frozen=True)
class Plot:
    """A drawing: its title, a sentence on how to read it, and the Plotly figure as plain data."""

    title: str
    note: str
    figure: Mapping[str, Any]
    height: int = 380


@dataclass(frozen=True)
class Point:
    """One point of a :func:`scatter`; ``label`` is the name it shows, ``more`` what else is to say of it."""

    x: float
    y: float
    group: str
    label: str
    more: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar of :func:`bars`."""

    label: str
    value: float
    more: str = ""


def lines(title: str, note: str, places: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str) -> Plot:
    """One line a series over ``places``, on a logarithmic scale. What is not a positive number leaves a gap."""
    go = _plotly()
    figure = go.Figure()
    for color, (name, values) in zip(_COLORS, series.items(), strict=False):
        figure.add_scatter(
            name=name,
            x=list(range(1, len(places) + 1)),
            y=[value if _has_logarithm(value) else None for value in values],
            customdata=[escape(place) for place in places],
            mode="lines+markers",
            marker={"size": 5},
            line={"color": color, "width": 2},
            hovertemplate=f"%{{customdata}}<br>{escape(y)}: %{{y:.4g}}<extra>{escape(name)}</extra>",
        )
    figure.update_layout(hovermode="x unified" if len(series) > 1 else "closest")
    figure.update_xaxes(title_text="layer, in the order of the forward pass", rangemode="tozero")
    drawn = [value for values in series.values() for value in values if value is not None and _has_logarithm(value)]
    figure.update_yaxes(title_text=y, **_logarithmic(drawn))
    return Plot(title, note, _plain(figure))


def scatter(title: str, note: str, points: Sequence[Point], x: str, y: str) -> Plot:
    """Plot positive points on two logarithmic scales, and the line where both are equal.

    Points at the same place are merged, so that thousands are drawn quickly.
    """
    go = _plotly()
    figure = go.Figure()
    spots: dict[tuple[str, int, int], list[Point]] = {}
    groups = _point_groups(points)
    for point in points:
        group = point.group if point.group in groups else _OTHERS
        spots.setdefault((group, _cell(point.x), _cell(point.y)), []).append(point)
    ends = [value for point in points for value in (point.x, point.y)]
    if ends:
        ends = [min(ends) / 2, max(ends) * 2]
        figure.add_scatter(
            name="equal", x=ends, y=ends, mode="lines", line={"color": "#8a8f98", "dash": "dot"}, hoverinfo="skip"
        )
    for color, name in zip(_COLORS, groups, strict=False):
        drawn = [spot for (group, _, _), spot in spots.items() if group == name]
        figure.add_scatter(
            name=escape(_short(name)),
            x=[spot[0].x for spot in drawn],
            y=[spot[0].y for spot in drawn],
            customdata=[_hover_text(spot) for spot in drawn],
            mode="markers",
            marker={
                "color": color,
                "size": [min(8 + 2 * math.log2(len(spot)), 20) for spot in drawn],
                "opacity": 0.8,
            },
            hovertemplate=f"%{{customdata}}<br>{escape(x)}: %{{x:.4g}}<br>{escape(y)}: %{{y:.4g}}<extra></extra>",
        )
    figure.update_xaxes(title_text=x, **_logarithmic(ends))
    figure.update_yaxes(title_text=y, **_logarithmic(ends))
    return Plot(title, note, _plain(figure), height=460)


def bars(title: str, note: str, items: Sequence[Bar], x: str, unit: str = "") -> Plot:
    """Plot horizontal bars, the longest on top. Bars after the twelfth, and those too short to see, are summed up.

    ``unit`` follows the numbers of the axis.
    """
    go = _plotly()
    ordered = sorted(items, key=lambda bar: -bar.value)
    shown = [bar for bar in ordered[:_MOST_BARS] if bar.value >= _SEEN * ordered[0].value]
    rest = ordered[len(shown) :]
    if len(rest) == 1:
        shown += rest  # it has a name, and takes no more space than the sum
    elif rest:
        shown.append(Bar(f"{len(rest)} {_OTHERS}", sum(bar.value for bar in rest)))
    figure = go.Figure()
    figure.add_bar(
        orientation="h",
        x=[bar.value for bar in shown],
        y=list(range(len(shown))),
        customdata=[escape(bar.label) + (f"<br>{escape(bar.more)}" if bar.more else "") for bar in shown],
        marker={"color": _COLORS[1]},
        width=0.4,
        hovertemplate=f"%{{customdata}}<br>{escape(x)}: %{{x:,.4g}}<extra></extra>",
    )
    for place, bar in enumerate(shown):  # above its bar: a phone has no space for the label at the side
        figure.add_annotation(
            x=0, y=place, text=escape(_short(bar.label)), showarrow=False, xanchor="left", yanchor="bottom", yshift=8
        )
    figure.update_xaxes(title_text=x, rangemode="tozero", ticksuffix=unit)
    figure.update_yaxes(range=[len(shown) - 0.5, -0.8], showticklabels=False, showgrid=False, zeroline=False)
    return Plot(title, note, _plain(figure, left=8), height=80 + 44 * len(shown))


def check_plotly() -> None:
    """Check before long work that Plotly is installed.

    Raises:
        FabricInitError: it is not installed.
    """
    _plotly()


def compressed_plotly() -> str:
    """Return the browser code of Plotly as gzip in base64: two fifths of its size, for browsers since 2023."""
    _plotly()
    return _compressed()


@cache
def _compressed() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _plotly() -> ModuleType:
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise FabricInitError(
            f'HTML pages are drawn with Plotly ({error}): pip install "fabric-init[html]", or save as .json.'
        ) from None
    module: ModuleType = plotly.graph_objects
    return module


def _plain(figure: Any, left: int = 64) -> dict[str, Any]:
    figure.update_layout(template=None, margin={"l": left, "r": 16, "t": 8, "b": 56})
    plain: dict[str, Any] = json.loads(figure.to_json())
    return plain


def _point_groups(points: Sequence[Point]) -> list[str]:
    """Return the groups with a color of their own, the largest first; the others share the last."""
    names = [name for name, _ in Counter(point.group for point in points).most_common()]
    return names if len(names) <= len(_COLORS) else [*names[: len(_COLORS) - 1], _OTHERS]


def _logarithmic(values: Sequence[float]) -> dict[str, Any]:
    """Return an axis with labels at powers of ten, and at 2 and 5 if it spans at most three of them."""
    narrow = bool(values) and max(values) <= 1000 * min(values)
    ticks = {"dtick": "D2", "exponentformat": "e"} if narrow else {"exponentformat": "power"}
    return {"type": "log", "minorloglabels": "complete" if narrow else "none", **ticks}


def _has_logarithm(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _cell(value: float) -> int:
    return round(math.log10(value) * _PER_DECADE)


def _hover_text(spot: Sequence[Point]) -> str:
    named = [f"<b>{escape(spot[0].label)}</b>"] + ([escape(spot[0].more)] if spot[0].more else [])
    named += [escape(point.label) for point in spot[1:_MOST_NAMES]]
    if len(spot) > _MOST_NAMES:
        named.append(f"and {len(spot) - _MOST_NAMES} more")
    return "<br>".join(named)


def _short(text: str, most: int = 50) -> str:
    """Shorten a long text: drop folders, then the middle, since the ends distinguish rules and lines."""
    if len(text) > most:
        text = re.sub(r"\S+/", "", text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
