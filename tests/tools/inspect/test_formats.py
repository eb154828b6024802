"""Of every format: the tensors that its reader gives, which file holds them, the values that torch counts, no fault."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fabric_init.checkpoints import Region, TensorSpec, open_checkpoint, register_reader, take, unregister_reader
from fabric_init.errors import CheckpointFormatError
from fabric_init.tools.inspect import inspect
from tests.support.every_format import URLS, with_urls, write_alone, write_by_ranks
from tests.support.ranks import run_ranks
from tests.support.zoo import write_checkpoint

NAME = "cross_tied"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One state dict in every format."""
    folder = tmp_path_factory.mktemp("formats")
    source = write_checkpoint(folder / "source.pt", NAME, partial=False)
    paths = write_alone(torch.load(source), folder / "alone", NAME)
    paths |= run_ranks(2, write_by_ranks, source=source, folder=folder / "ranks", name=NAME)[0]
    return with_urls(paths)


KINDS = [
    "safetensors",
    "safetensors with index",
    ".pt",
    "legacy .pt",
    ".bin with index",
    "legacy .bin with index",
    "lit_model.pth",
    "Lightning's file",
    "Lightning's folder",
    "cache of the Hub",
    "cache of the Hub, sharded",
    "DCP folder of one process",
    "DCP folder of two ranks",
    "DeepSpeed ZeRO-3",
    "GGUF",
    *URLS,
]


def test_the_list_is_whole(written: dict[str, str]) -> None:
    assert written.keys() == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_the_reader_and_their_values_those_of_torch(written: dict[str, str], kind: str) -> None:
    contents = inspect(written[kind], values=True)
    assert contents.damage == ()
    reader = open_checkpoint(written[kind])
    assert [row.key for row in contents.tensors] == list(reader.keys())
    assert contents.format.removesuffix(" of one file") == reader.format
    for row in contents.tensors:
        spec = reader.spec(row.key)
        assert (row.shape, f"torch.{row.dtype}") == (tuple(spec.shape), str(spec.dtype))
        assert row.nbytes == spec.shape.numel() * spec.dtype.itemsize
        assert row.whole
        assert row.values is not None
        assert_counted(reader.read(row.key), row.values.min, row.values.max, row.values.mean, row.values.std)
    assert json.loads(json.dumps(contents.to_dict(), allow_nan=False))["sound"]


def assert_counted(tensor: Tensor, low: float, high: float, mean: float, std: float) -> None:
    wide = tensor.double()
    assert (low, high) == (wide.min().item(), wide.max().item())
    assert mean == pytest.approx(wide.mean().item(), rel=1e-12, abs=1e-12)
    assert std == pytest.approx(wide.std(correction=0).item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "URL" not in kind])
def test_every_file_is_named_with_its_size_and_holds_the_bytes_of_its_tensors(
    written: dict[str, str], kind: str
) -> None:
    contents = inspect(written[kind])
    path = Path(written[kind])
    sizes = {file.name: file.stat().st_size for file in (path.rglob("*") if path.is_dir() else path.parent.iterdir())}
    for file in contents.files:
        assert file.nbytes == sizes[file.name]
        assert file.tensor_nbytes <= file.nbytes
    held = {name for row in contents.tensors for name in row.files}
    assert held <= {file.name for file in contents.files}
    assert sum(file.tensor_nbytes for file in contents.files) == contents.nbytes


@pytest.mark.parametrize("kind", [".pt", "legacy .pt", "DeepSpeed ZeRO-3"])
def test_ties_share_their_bytes(written: dict[str, str], kind: str) -> None:
    contents = inspect(written[kind])
    assert len(contents.ties) == 1
    tied = [row for row in contents.tensors if row.key in contents.ties[0]]
    assert len(tied) > 1
    assert contents.nbytes == sum(row.nbytes for row in contents.tensors) - sum(row.nbytes for row in tied[1:])


@pytest.mark.parametrize("kind", ["safetensors", "DCP folder of one process", "DCP folder of two ranks"])
def test_copies_that_share_nothing_are_duplicates_by_their_values(written: dict[str, str], kind: str) -> None:
    contents = inspect(written[kind], values=True)
    assert contents.ties == ()
    assert contents.duplicates == inspect(written[".pt"]).ties


def test_without_values_no_weight_is_read(tmp_path: Path) -> None:
    """The data is a hole in the file: terabytes that no disk has and no test could read."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**42)
    (row,) = inspect(tmp_path).tensors
    assert row.nbytes == 2**42


def test_values_of_a_large_tensor_are_counted_in_little_memory(tmp_path: Path) -> None:
    size = 1 << 28
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    code = (
        "import resource, sys; from fabric_init.tools.inspect import inspect; inspect(sys.argv[1])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); inspect(sys.argv[1], values=True); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 2


def test_complex_boolean_and_transposed_values_are_counted(tmp_path: Path) -> None:
    state = {
        "complex": torch.complex(torch.arange(4.0), -torch.arange(4.0)),
        "flags": torch.tensor([True, False, False, False]),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
        "stacked": torch.arange(6.0).reshape(3, 2),
        "sliced": torch.arange(20.0).reshape(4, 5)[1:3, 2:4],
        "eighth": torch.arange(4.0).to(torch.float8_e4m3fn),
        "none": torch.zeros(0),
    }
    torch.save(state, tmp_path / "model.pt")
    contents = inspect(tmp_path, values=True)
    found = {row.key: row.values for row in contents.tensors}
    assert contents.sound
    assert found["complex"] is not None
    assert (found["complex"].min, found["complex"].max, found["complex"].mean) == (-3, 3, 0)
    for key in ("flags", "turned", "sliced", "eighth"):
        values = found[key]
        assert values is not None
        assert_counted(state[key], values.min, values.max, values.mean, values.std)
    assert found["none"] is not None
    assert math.isnan(found["none"].mean)
    # The bytes of "stacked" and "turned" are the same, in another order of dimensions.
    assert contents.duplicates == ()


def test_of_several_state_dicts_all_are_shown_or_the_one_asked_for(tmp_path: Path) -> None:
    nets = {"generator": {"weight": torch.ones(2, 3)}, "critic": {"weight": torch.zeros(4), "bias": torch.zeros(1)}}
    torch.save(nets, tmp_path / "gan.pt")
    contents = inspect(tmp_path)
    assert contents.entries == {"generator": 1, "critic": 2}
    assert [row.key for row in contents.tensors] == ["generator.weight", "critic.weight", "critic.bias"]
    assert contents.sound
    assert [row.key for row in inspect(tmp_path, entry="critic").tensors] == ["weight", "bias"]
    with pytest.raises(CheckpointFormatError, match="no state dict 'actor'"):
        inspect(tmp_path, entry="actor")


def test_globs_choose_tensors_and_leave_files_alone(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2), "a.bias": torch.ones(1), "b.bias": torch.ones(1)}, tmp_path / "m.safetensors")
    contents = inspect(tmp_path, match=["*.bias"])
    assert {row.key for row in contents.tensors} == {"a.bias", "b.bias"}
    assert [file.tensors for file in contents.files] == [3]


class RawReader:
    """A format of somebody else: the file is one float32 vector."""

    format = "raw"
    note: str | None = None

    def __init__(self, path: Path, *, mmap: bool) -> None:
        self.path = path
        self._values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)

    def keys(self) -> list[str]:
        return ["values"]

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._values.shape, self._values.dtype)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        return take(self._values, region)


@pytest.fixture
def raw() -> Iterator[None]:
    register_reader("raw", lambda candidate: candidate.path.suffix == ".raw", RawReader)
    yield
    unregister_reader("raw")


@pytest.mark.usefixtures("raw")
def test_a_registered_format_is_shown_as_its_reader_tells(tmp_path: Path) -> None:
    (tmp_path / "w.raw").write_bytes(torch.arange(3.0).numpy().tobytes())
    contents = inspect(tmp_path / "w.raw", values=True)
    (row,) = contents.tensors
    assert (contents.format, row.key, row.shape, row.dtype) == ("raw", "values", (3,), "float32")
    assert row.values is not None
    assert row.values.max == 2
