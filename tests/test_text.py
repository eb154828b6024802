"""Counts, sizes and lists of names, as messages and reports show them."""

from __future__ import annotations

import ast

import pytest
import torch
from rich.filesize import decimal

from fabric_init._text import counted, dtype_name, human_bytes, joined, listed, quoted, shape_text


def test_sizes_and_shapes_read_as_people_write_them() -> None:
    assert (human_bytes(13_500_000_000), human_bytes(10)) == ("13.5 GB", "10 bytes")
    assert (shape_text((4096, 11008)), shape_text(())) == ("4096×11008", "scalar")
    assert dtype_name(torch.float32) == "float32"


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 999_949, 1_000_000, 10**9, 123_456_789_012, 5 * 10**12])
def test_sizes_are_those_of_rich(nbytes: int) -> None:
    assert human_bytes(nbytes) == decimal(nbytes).replace("1 bytes", "1 byte")


def test_counts_have_a_plural_and_thousands() -> None:
    assert [counted(number, "tensor") for number in (0, 1, 2000)] == ["0 tensors", "1 tensor", "2,000 tensors"]


def test_long_lists_are_cut_with_a_count() -> None:
    names = [f"layer.{number}" for number in range(37)]
    assert joined(names[:2]) == "layer.0, layer.1"
    assert joined(names, most=2) == "layer.0, layer.1 … and 35 more"
    assert listed(names[:20]).splitlines() == [f"  {name}" for name in names[:20]]
    assert listed(names).splitlines() == [*(f"  {name}" for name in names[:20]), "  … and 17 more"]


@pytest.mark.parametrize("text", ["plain", r"^model\.", 'with "quotes"', '\\d"', "it's"])
def test_quoted_text_is_the_literal_of_itself(text: str) -> None:
    assert ast.literal_eval(quoted(text)) == text


def test_a_regular_expression_is_quoted_raw() -> None:
    assert quoted(r"^model\.") == r'''r"^model\."'''
