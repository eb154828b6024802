"""Checkpoints at URLs: in fsspec's memory, and from a real web server that counts the bytes it sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fabric_init.checkpoints import Box, RemotePath, Span, open_checkpoint, take
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from tests.support.regions import regions
from tests.support.web_server import Server, serving

BASE = torch.arange(24.0).reshape(4, 6)
STATE = {
    "a.weight": BASE,
    "a.bias": torch.arange(6, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7),
}
# torch.save keeps these as they are; safetensors takes contiguous tensors only.
STRIDED = {
    **STATE,
    "transposed": torch.arange(30.0).reshape(5, 6).t(),
    "expanded": torch.arange(4.0).expand(3, 4),
    "part": torch.arange(100.0).reshape(10, 10)[2:7, 3:6],
    "cube": torch.arange(60).reshape(3, 4, 5).permute(2, 0, 1),
    "tied": BASE,
    "complex": torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3).conj(),
}
NAMES = ("model.safetensors", "model.pt", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_file(STATE, path / "model.safetensors")
    torch.save(STRIDED, path / "model.pt")
    for suffix, kind, save in ((".safetensors", "model", save_file), (".bin", "pytorch_model", torch.save)):
        halves = [dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])]
        for number, half in enumerate(halves):
            save(half, path / f"shard-{number}{suffix}")
        weight_map = {key: f"shard-{number}{suffix}" for number, half in enumerate(halves) for key in half}
        (path / f"{kind}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as state:
        yield state


@pytest.fixture(scope="module")
def memory(folder: Path) -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.makedirs("/checkpoints", exist_ok=True)
    for file in folder.iterdir():
        filesystem.pipe_file(f"/checkpoints/{file.name}", file.read_bytes())
    yield "memory://checkpoints"
    filesystem.rm("/checkpoints", recursive=True)


@pytest.mark.parametrize("where", ["server", "memory"])
@pytest.mark.parametrize("name", NAMES)
def test_every_format_reads_the_same_from_a_url(server: Server, memory: str, where: str, name: str) -> None:
    url = f"{server.url if where == 'server' else memory}/{name}"
    reader = open_checkpoint(url)
    assert str(reader.path) == url
    wanted = STRIDED if name == "model.pt" else STATE
    assert sorted(reader.keys()) == sorted(wanted)
    for key, value in wanted.items():
        assert reader.spec(key).shape == value.shape
        assert reader.spec(key).dtype == value.dtype
        assert torch.equal(reader.read(key), value), key


def test_a_file_in_the_legacy_format_is_read_whole(memory: str) -> None:
    with fsspec.open(f"{memory}/old.pt", "wb") as file:
        torch.save(STRIDED, file, _use_new_zipfile_serialization=False)
    reader = open_checkpoint(f"{memory}/old.pt")
    assert "legacy" in str(reader.note)
    assert all(torch.equal(reader.read(key), value) for key, value in STRIDED.items())


def test_a_url_of_a_folder_opens_what_is_preferred_in_it(server: Server, memory: str) -> None:
    assert open_checkpoint(memory).format == "safetensors"
    assert open_checkpoint(f"{server.url}/").format == "safetensors"


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_region_is_the_same_part_of_the_whole(memory: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    reader = open_checkpoint(f"{memory}/{name}")
    key = data.draw(st.sampled_from(list(reader.keys())))
    region = data.draw(regions(tuple(reader.spec(key).shape)))
    assert torch.equal(reader.read(key, region), take(STRIDED[key], region))


# -- what goes over the wire ---------------------------------------------------------------------------------------

ROWS, COLUMNS = 512, 40_000
BIG = torch.arange(ROWS * COLUMNS, dtype=torch.int32).reshape(ROWS, COLUMNS)  # 80 MB


@pytest.fixture(scope="module", params=["big.safetensors", "big.pt"])
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    path = tmp_path_factory.mktemp("big")
    tensors = {"big": BIG, "small": torch.ones(3)}
    (save_file if request.param.endswith("safetensors") else torch.save)(tensors, path / request.param)
    with serving(path) as state:
        yield state, f"{state.url}/{request.param}"


def test_opening_fetches_the_header_and_a_region_its_own_bytes(big: tuple[Server, str]) -> None:
    server, url = big
    reader = open_checkpoint(url)
    assert server.sent < 300_000
    for region in (
        Span(1_000_000, 1_500_000),
        Box((100, 0), (20, COLUMNS)),
        Box((7, 10_000), (100, 5_000)),
        Box((ROWS - 1, COLUMNS - 1), (1, 1)),
    ):
        server.reset()
        part = reader.read("big", region)
        assert torch.equal(part, take(BIG, region))
        assert part.nbytes <= server.sent <= part.nbytes + 100


def test_nearly_neighbors_are_fetched_together(big: tuple[Server, str]) -> None:
    server, url = big
    reader = open_checkpoint(url)
    server.reset()
    region = Box((0, 0), (64, COLUMNS - 1000))  # a gap of 4 kB a row
    assert torch.equal(reader.read("big", region), take(BIG, region))
    assert len([one for one in server.requests if one.startswith("GET")]) <= 4
    assert server.sent <= 64 * COLUMNS * 4 + 100


def test_a_large_tensor_comes_in_several_requests(big: tuple[Server, str]) -> None:
    server, url = big
    reader = open_checkpoint(url)
    server.reset()
    assert torch.equal(reader.read("big"), BIG)
    assert len(server.requests) > 8
    assert server.sent <= BIG.nbytes + 100


# -- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_server_without_ranges_is_refused_before_a_weight_is_fetched(folder: Path, name: str) -> None:
    with (
        serving(folder, ranges=False) as state,
        pytest.raises(CheckpointFormatError, match=r"part of a file.*Down"),
    ):
        open_checkpoint(f"{state.url}/{name}")


def test_a_server_that_is_not_there_is_no_missing_file() -> None:
    for url in ("https://nowhere.invalid/no.safetensors", "http://127.0.0.1:9/no.safetensors"):
        with pytest.raises(CheckpointFormatError, match=f"{url} cannot be reached: Cannot connect"):
            open_checkpoint(url)


def test_what_is_missing_is_named(server: Server, memory: str) -> None:
    for url in (f"{server.url}/no.safetensors", f"{memory}/no.safetensors", f"{memory}/no/folder"):
        with pytest.raises(CheckpointNotFoundError, match=f"{url} does not exist"):
            open_checkpoint(url)


def test_no_server_and_no_such_scheme_are_errors_of_ours(folder: Path) -> None:
    with serving(folder) as state:
        url = state.url
    with pytest.raises(CheckpointError, match=url):
        open_checkpoint(f"{url}/model.safetensors")
    with pytest.raises(CheckpointFormatError, match="nosuch://host/x cannot be opened with fsspec"):
        open_checkpoint("nosuch://host/x")


def test_a_secret_in_a_url_is_not_in_the_error() -> None:
    assert str(RemotePath("http://user:password@127.0.0.1:9/x.pt?signature=secret")) == "http://127.0.0.1:9/x.pt"


def test_a_file_that_shrinks_or_a_server_that_goes_away_is_noticed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "m.safetensors")
    with serving(tmp_path) as state:
        reader = open_checkpoint(f"{state.url}/m.safetensors")
        (tmp_path / "m.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:500])
        with pytest.raises(CheckpointFormatError, match=r"m.safetensors"):
            reader.read("w")
    with pytest.raises(CheckpointError, match=r"m.safetensors"):
        reader.read("w")


def test_code_in_a_remote_pickle_does_not_run(memory: str) -> None:
    with fsspec.open(f"{memory}/evil.pt", "wb") as file:
        torch.save({"w": torch.ones(1), "code": Path("x")}, file)
    with pytest.raises(CheckpointFormatError, match=r"evil.pt holds more than tensors: its pickle names pathlib"):
        open_checkpoint(f"{memory}/evil.pt")


@settings(max_examples=150, deadline=3000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_errors_of_ours(folder: Path, memory: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["model.pt", "model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        near = data.draw(st.sampled_from([0, len(content) // 2, len(content) - 2000]))
        at = min(len(content) - 1, max(0, near + data.draw(st.integers(0, 2000))))
        content[at] = data.draw(st.integers(0, 255))
    url = f"memory://damaged/{name}"
    fsspec.filesystem("memory").pipe_file(
        f"/damaged/{name}", bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    )
    refusal = None
    try:
        reader = open_checkpoint(url)
        for key in reader.keys():
            assert reader.spec(key).shape.numel() <= 1000
            assert reader.read(key).shape == reader.spec(key).shape
    except CheckpointError as error:
        refusal = str(error)
    assert refusal is None or url in refusal
