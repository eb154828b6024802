"""Reading ahead brings the same values with fewer requests, within its bound, and its failures are those of a read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from fabric_init import CheckpointError, deferred_init, materialize
from fabric_init.checkpoints import open_checkpoint, take, write_manifest
from fabric_init.checkpoints.reader import places
from fabric_init.checkpoints.storage import http, read_ahead
from fabric_init.checkpoints.storage.read_ahead import PIECE_BYTES, Place, ReadAhead
from tests.support.regions import regions
from tests.support.web_server import Server, serving

COUNT = 300
STATE = {f"{number}.weight": torch.randn(7, 9) for number in range(COUNT)}
STRIDED = {
    "plain": torch.arange(24.0).reshape(4, 6),
    "transposed": torch.arange(30.0).reshape(5, 6).t(),
    "expanded": torch.arange(4.0).expand(3, 4),
    "part": torch.arange(100.0).reshape(10, 10)[2:7, 3:6],
    "long": torch.arange(60_000, dtype=torch.float64).reshape(4, 15_000),
}


def model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(9, 7, bias=False) for _ in range(COUNT)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_file(dict(reversed(STATE.items())), path / "model.safetensors")
    torch.save(STATE, path / "model.pt")
    torch.save(STRIDED, path / "strided.pt")
    save_file({key: value.contiguous() for key, value in STRIDED.items()}, path / "strided.safetensors")
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as state:
        yield state


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_fill_asks_a_server_for_many_small_tensors_at_once(server: Server, name: str) -> None:
    with deferred_init():
        filled = model()
    materialize(filled, checkpoint=f"{server.url}/{name}")
    for key, value in filled.state_dict().items():
        assert torch.equal(value, STATE[key])
    assert len(server.requests) < 20


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_read_lies_in_the_places_that_were_named(server: Server, data: st.DataObject) -> None:
    reader = open_checkpoint(f"{server.url}/{data.draw(st.sampled_from(['strided.pt', 'strided.safetensors']))}")
    reads = []
    for key in reader.keys():
        if data.draw(st.booleans()):
            reads.append((key, data.draw(regions(tuple(reader.spec(key).shape)))))
    server.reset()
    with ReadAhead([places(reader, key, region) for key, region in reads]) as ahead:
        for index, (key, region) in enumerate(reads):
            ahead.reading(index)
            assert torch.equal(reader.read(key, region), take(STRIDED[key], region))
    assert len(server.requests) <= 2 * len(reads)


def test_blocks_of_a_manifest_are_checked_however_they_were_read(server: Server, folder: Path, tmp_path: Path) -> None:
    manifest = write_manifest(folder / "model.safetensors", tmp_path / "sums", block_bytes=4096)
    with deferred_init():
        filled = model()
    materialize(filled, checkpoint=f"{server.url}/model.safetensors", manifest=manifest)
    assert torch.equal(filled.get_parameter("7.weight"), STATE["7.weight"])
    assert len(server.requests) < 20
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    with deferred_init():
        filled = model()
    with serving(tmp_path) as other, pytest.raises(CheckpointError, match="SHA-256 mismatch"):
        materialize(filled, checkpoint=f"{other.url}/model.safetensors", manifest=manifest)


class Counting:
    """A file whose requests are counted and answered when they are let."""

    mapped = False
    path = "memory://x"

    def __init__(self, answer: Callable[[int, int], bytes]) -> None:
        self.ahead: ReadAhead | None = None
        self.asked: list[tuple[int, int]] = []
        self.buffers = 0
        self._answer = answer

    def request(self, start: int, stop: int, buffer: bytearray) -> bytes:
        self.asked.append((start, stop))
        self.buffers += len(buffer)
        return self._answer(start, stop)


def content(start: int, stop: int) -> bytes:
    return bytes(at * 7 % 251 for at in range(start, stop))


def test_no_more_is_requested_than_the_bound_before_it_is_taken() -> None:
    file = Counting(lambda start, stop: bytes(stop - start))
    piece = PIECE_BYTES
    with ReadAhead([[Place(file, at * piece, (at + 1) * piece)] for at in range(6)], bound=2 * piece) as ahead:
        for index in range(6):
            ahead.reading(index)
            target = memoryview(bytearray(piece))
            assert ahead.take(file, index * piece, target)
            assert len(file.asked) <= index + 3
    assert sorted(file.asked) == [(at * piece, (at + 1) * piece) for at in range(6)]
    assert file.ahead is None


def test_small_pieces_take_no_more_memory_than_they_have_bytes() -> None:
    file = Counting(content)
    with ReadAhead([[Place(file, at << 20, (at << 20) + 100)] for at in range(500)]):
        pass
    assert file.buffers <= 500 * 100


def test_a_tensor_larger_than_the_bound_flows_through_it() -> None:
    file = Counting(lambda start, stop: bytes(stop - start))
    with ReadAhead([[Place(file, 0, 5 * PIECE_BYTES)]], bound=PIECE_BYTES) as ahead:
        ahead.reading(0)
        for at in range(5):
            assert ahead.take(file, at * PIECE_BYTES, memoryview(bytearray(PIECE_BYTES)))


def test_two_threads_that_take_the_same_bytes_get_the_same_values() -> None:
    file = Counting(content)
    reads = [[Place(file, 1000 * index, 1000 * index + 1000)] for index in range(40)]
    barrier = threading.Barrier(4)

    def take_all() -> list[bytes | None]:
        barrier.wait()
        taken: list[bytes | None] = []
        for index in range(40):
            target = bytearray(600)
            taken.append(bytes(target) if ahead.take(file, 1000 * index + 300, memoryview(target)) else None)
        return taken

    with ReadAhead(reads, bound=3000) as ahead, ThreadPoolExecutor(4) as pool:
        for taken in [each.result() for each in [pool.submit(take_all) for _ in range(4)]]:
            for index, values in enumerate(taken):
                assert values in (None, content(1000 * index + 300, 1000 * index + 900))


def test_what_was_not_named_is_left_to_a_read_of_its_own() -> None:
    file = Counting(content)
    with ReadAhead([[Place(file, 100, 200)]]) as ahead:
        assert not ahead.take(file, 150, memoryview(bytearray(100)))
        assert not ahead.take(file, 0, memoryview(bytearray(50)))


def test_a_request_that_fails_is_an_error_of_the_read_that_needs_it() -> None:
    def fail(start: int, stop: int) -> bytes:
        raise CheckpointError("the network is gone")

    file = Counting(fail)
    with pytest.raises(CheckpointError, match="the network is gone"), ReadAhead([[Place(file, 0, 10)]]) as ahead:
        ahead.reading(0)
        ahead.take(file, 0, memoryview(bytearray(10)))
    assert file.ahead is None


def test_an_error_does_not_wait_for_a_server_that_says_nothing() -> None:
    answers, answered = threading.Event(), []

    def stall(start: int, stop: int) -> bytes:
        answers.wait(20)
        answered.append(start)
        return bytes(stop - start)

    file = Counting(stall)
    with pytest.raises(ZeroDivisionError), ReadAhead([[Place(file, 0, 10)]]):
        raise ZeroDivisionError
    assert not answered
    answers.set()


def test_a_process_that_can_start_no_thread_reads_without_reading_ahead(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = [open_checkpoint(place) for place in (f"{server.url}/model.safetensors", folder / "model.safetensors")]
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name.startswith("fabric_init"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(read_ahead, "MAPPED_BYTES", 0)
    monkeypatch.setattr(read_ahead, "is_cached", lambda parts: False)
    monkeypatch.setattr(threading.Thread, "start", start_others)
    for reader in readers:
        with ReadAhead([places(reader, key) for key in STATE]) as ahead:
            for index, (key, value) in enumerate(list(STATE.items())[:20]):
                ahead.reading(index)
                assert torch.equal(reader.read(key), value)


def test_a_file_system_that_is_not_asynchronous_is_asked_by_one_thread_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, asking = MemoryFileSystem.cat_ranges, threading.Lock()

    def on_one_connection(*args: Any, **kwargs: Any) -> Any:
        assert asking.acquire(blocking=False)  # else answers would be mixed up, as with FTP
        time.sleep(0.01)
        asking.release()
        return answer(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", on_one_connection)
    state = {str(number): torch.randn(30_000) for number in range(9)}
    MemoryFileSystem().pipe("/one/model.safetensors", save(state))
    reader = open_checkpoint("memory://one/model.safetensors")
    keys = list(state)[::2]  # too far from each other for one request
    with ReadAhead([places(reader, key) for key in keys]) as ahead:
        for index, key in enumerate(keys):
            ahead.reading(index)
            assert torch.equal(reader.read(key), state[key])


@pytest.mark.parametrize("times", [2, 100])
def test_a_server_that_is_busy_for_a_while_is_asked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(http, "SECONDS_TO_NEXT_TRY", (0.0, 0.0, 0.0))
    reader = open_checkpoint(f"{server.url}/model.safetensors")
    server.busy = times
    if times == 2:
        assert torch.equal(reader.read("7.weight"), STATE["7.weight"])
    else:
        with pytest.raises(CheckpointError, match="503"):
            reader.read("7.weight")
    server.busy = 0


def test_a_server_that_changes_the_file_during_a_fill_ends_it(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    with serving(tmp_path) as state:
        reader = open_checkpoint(f"{state.url}/model.safetensors")
        save_file({key: value + 1 for key, value in STATE.items()}, tmp_path / "model.safetensors")
        with (
            pytest.raises(CheckpointError, match="changed after it was opened"),
            ReadAhead([places(reader, key) for key in STATE]),
        ):
            reader.read("7.weight")


@pytest.mark.parametrize("cached", [False, True])
def test_maps_are_read_ahead_from_front_to_back_unless_they_are_in_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    begun: list[list[tuple[Path, int, int]]] = []
    monkeypatch.setattr(read_ahead, "BackgroundReading", begun.append)
    monkeypatch.setattr(read_ahead, "MAPPED_BYTES", 0)
    monkeypatch.setattr(read_ahead, "is_cached", lambda parts: cached)
    with deferred_init():
        filled = model()
    materialize(filled, checkpoint=folder / "model.safetensors")
    if cached:
        assert not begun
        return
    [parts] = begun
    assert len(parts) == COUNT
    assert parts == sorted(parts)
    assert sum(stop - start for _, start, stop in parts) == sum(value.nbytes for value in STATE.values())
