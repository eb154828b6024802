"""Rows of text as a plain table or as Markdown: the first column to the left, figures to the right."""

from __future__ import annotations

from collections.abc import Sequence


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(_aligned, line, widths, range(len(widths)))).rstrip() for line in lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = [":--", *["--:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (headers, rule, *rows))


def _aligned(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"
