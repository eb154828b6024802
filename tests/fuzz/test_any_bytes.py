"""Bytes, headers and indexes that no writer wrote: an error of ours or a reader that works, and no other exception."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fabric_init.checkpoints import SafetensorsReader, ShardedReader, Span, open_checkpoint
from fabric_init.errors import FabricInitError

STATE = {
    "layers.0.weight": torch.ones(3, 4),
    "layers.0.bias": torch.zeros(4, dtype=torch.bfloat16),
    "n": torch.tensor(3),
}
SAFETENSORS = save(STATE)
FUZZ = settings(max_examples=100, deadline=2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    (path / "shard.safetensors").write_bytes(SAFETENSORS)
    return path


def exercise(reader: SafetensorsReader | ShardedReader) -> None:
    """A reader that opens must also read, within the bytes of its file."""
    for key in reader.keys():
        spec = reader.spec(key)
        assert spec.shape.numel() <= 1000
        assert reader.read(key).shape == spec.shape
        assert reader.read(key, Span(0, spec.shape.numel())).numel() == spec.shape.numel()


@contextmanager
def refusals_that_name(path: Path) -> Iterator[None]:
    """Errors of ours are fine as long as they name the file; any other one fails the test."""
    refusal = None
    try:
        yield
    except FabricInitError as error:
        refusal = str(error)
    assert refusal is None or str(path) in refusal


@FUZZ
@given(header=st.binary(max_size=60), size=st.none() | st.integers(0, 2**64 - 1), tail=st.binary(max_size=8))
def test_any_bytes_at_all_as_a_safetensors_file(folder: Path, header: bytes, size: int | None, tail: bytes) -> None:
    path = folder / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + tail)
    with refusals_that_name(path):
        exercise(SafetensorsReader(path))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "F6_E2M3", "BF16", "BOOL", "C64", "F8_E8M0", "", None]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**62, 2**63, 2**64 - 1, 2**70, 1.5]), max_size=4),
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 2**63, 2**64 - 1, -1]), min_size=1, max_size=3),
    }
)


@FUZZ
@given(header=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.sampled_from([0, 4, 8]))
def test_a_header_of_plausible_lies(folder: Path, header: dict[str, object], size: int) -> None:
    path = folder / "lies.safetensors"
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(size))
    with refusals_that_name(path):
        exercise(SafetensorsReader(path))


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@FUZZ
@given(content=JSON, weight_map=st.none() | st.dictionaries(st.text(max_size=5), JSON))
def test_any_json_as_an_index(folder: Path, content: object, weight_map: object) -> None:
    path = folder / "any.safetensors.index.json"
    path.write_text(json.dumps(content if weight_map is None else {"weight_map": weight_map}))
    with refusals_that_name(path):
        exercise(ShardedReader(path))


@FUZZ
@given(data=st.binary(max_size=100), name=st.sampled_from(["m.bin", "m.safetensors", "m.index.json", "m"]))
def test_any_bytes_at_all_under_any_name(folder: Path, data: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(data)
    with pytest.raises(FabricInitError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
