"""A format of one's own, registered with one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fabric_init
from fabric_init.checkpoints import (
    Candidate,
    Region,
    TensorSpec,
    open_checkpoint,
    register_reader,
    take,
    unregister_reader,
    write_manifest,
)
from fabric_init.errors import CheckpointFormatError


class NumpyReader:
    """One ``.npy`` file as a checkpoint with one tensor."""

    format = "npy"
    note: str | None = None

    def __init__(self, path: str | Path, *, mmap: bool = True) -> None:
        self.path = Path(path)
        self._array = np.load(self.path, mmap_mode="c" if mmap else None)

    def keys(self) -> Sequence[str]:
        return ["weight"]

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(torch.Size(self._array.shape), torch.float32)

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        return take(torch.from_numpy(self._array), region)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_reader("npy", lambda candidate: candidate.head.startswith(b"\x93NUMPY"), NumpyReader)
    yield
    unregister_reader("npy")


@pytest.fixture
def array(tmp_path: Path) -> Path:
    np.save(tmp_path / "w.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    return tmp_path / "w.npy"


def test_a_registered_format_fills_a_model(array: Path) -> None:
    with fabric_init.deferred_init():
        model = torch.nn.Linear(3, 2, bias=False)
    fabric_init.materialize(model, checkpoint=array)
    assert torch.equal(model.weight, torch.arange(6.0).reshape(2, 3))


def test_the_latest_is_asked_first_and_a_name_again_replaces_it(array: Path) -> None:
    class Other(NumpyReader):
        format = "other"

    register_reader("by name", lambda candidate: candidate.path.name.endswith(".npy"), Other)
    assert open_checkpoint(array).format == "other"
    register_reader("by name", lambda candidate: False, Other)
    assert open_checkpoint(array).format == "npy"
    unregister_reader("by name")
    unregister_reader("npy")
    with pytest.raises(CheckpointFormatError, match="is a NumPy array"):
        open_checkpoint(array)


def test_a_folder_is_recognized_by_the_names_in_it(array: Path) -> None:
    register_reader("npy", lambda it: it.names == ("w.npy",), lambda path, mmap: NumpyReader(path / "w.npy", mmap=mmap))
    assert torch.equal(open_checkpoint(array.parent).read("weight")[1], torch.tensor([3.0, 4, 5]))


def test_a_url_of_a_scheme_that_nobody_knows_is_given_as_it_is(array: Path) -> None:
    seen = []

    def opens(url: str, mmap: bool) -> NumpyReader:
        seen.append(url)
        return NumpyReader(array, mmap=mmap)

    register_reader("npy", lambda candidate: candidate.asked.startswith("store://"), opens)
    assert open_checkpoint("store://bucket/key?version=3").format == "npy"
    assert seen == ["store://bucket/key?version=3"]


def test_a_manifest_is_compared_before_the_reader_gets_the_file(array: Path) -> None:
    sums = write_manifest(array)
    assert open_checkpoint(array, manifest=sums).format == "npy"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=r"w\.npy: SHA-256 mismatch"):
        open_checkpoint(array, manifest=sums)


def test_two_functions_are_needed() -> None:
    with pytest.raises(TypeError, match="needs two functions"):
        register_reader("npy", NumpyReader, None)  # type: ignore[arg-type]


def test_a_candidate_asks_nothing_before_it_is_looked_at() -> None:
    candidate = Candidate("nosuch://host/path")
    assert candidate.asked == "nosuch://host/path"
    assert candidate.is_url
    with pytest.raises(CheckpointFormatError, match="nosuch"):
        _ = candidate.head
