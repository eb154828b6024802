"""A pickle read as plain data: nothing in it runs, nothing it asks for takes memory without bound."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fabric_init.checkpoints.formats.pickles.plain_data import Record, RestrictedPickleError, load_inert

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(PLAIN, st.integers(2, 5))
def test_plain_data_comes_out_as_it_went_in(value: object, protocol: int) -> None:
    assert load_inert(pickle.dumps(value, protocol), ()) == value


def test_calls_are_put_down_and_not_made() -> None:
    found = load_inert(pickle.dumps([torch.Size((2, 3)), torch.float16, OrderedDict(a=1)]), ["torch.Size", ORDERED])
    assert isinstance(found[0], Record)
    assert (found[0].name, found[0].arguments) == ("torch.Size", ((2, 3),))
    assert found[1] is torch.float16
    assert found[2] == {"a": 1}


ORDERED = "collections.OrderedDict"


def test_a_name_that_is_not_expected_is_refused(harmful: object, marker: Path) -> None:
    for value, name in ((harmful, r"posix\.mkdir"), (PurePosixPath("a"), "PurePosixPath"), (eval, "eval")):
        for protocol in (2, 4):
            with pytest.raises(RestrictedPickleError, match=f"it names .*{name}, which is not expected"):
                load_inert(pickle.dumps({"a": value}, protocol), [ORDERED])
    assert not marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04r\xff\xff\xff\x7f.",  # puts nothing at place 2**31 - 1: the interpreter in C makes room for it
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes, a terabyte
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        b"\x80\x04X\xff\xff\xff\x7fabc.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00N.",  # a frame of a terabyte
        b"\x80\x04]2" + b"22222222" * 100 + b".",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04N\x85R.",
        b"\x80\x04NNb.",
        b"\x80\x04\x8c\x05torch\x8c\x04Size\x93}\x8c\x01x\x8c\x01ysb.",  # sets attributes of the class itself
        b"\x80\x04" + b"(" * 1000 + b".",
        b"",
        b".",
    ],
)
def test_wrong_instructions_are_refused_in_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        try:
            load_inert(data, ["torch.Size"])
        except RestrictedPickleError:
            refused = True
        else:
            refused = False
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert refused or data.startswith((b"\x80\x04]r", b"\x80\x04\x95", b"\x80\x04X"))


@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    with suppress(RestrictedPickleError):
        load_inert(b"\x80\x04" + data, ["torch.Size"])
