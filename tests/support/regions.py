"""Any region of a tensor, for hypothesis."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import strategies as st

from fabric_init.checkpoints import Box, Region, Span


@st.composite
def regions(draw: st.DrawFn, shape: Sequence[int]) -> Region | None:
    """A span or a box inside ``shape``, empty ones too, or ``None`` for the whole."""
    kind = draw(st.sampled_from(["whole", "span", "box"]))
    if kind == "whole":
        return None
    if kind == "span":
        start = draw(st.integers(0, math.prod(shape)))
        return Span(start, draw(st.integers(start, math.prod(shape))))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)))
