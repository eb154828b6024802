"""Reading ahead of maps: the right parts, on systems without a call for it too, and never an error."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fabric_init.checkpoints.storage import page_cache
from fabric_init.checkpoints.storage.page_cache import BackgroundReading, is_cached


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "fabric_init read-ahead":
            thread.join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, count, how: found.append((start, count)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return found


def test_parts_that_touch_are_read_together_and_large_ones_in_steps(
    tmp_path: Path, asked: list[tuple[int, int]]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    a, b = tmp_path / "a", tmp_path / "b"
    BackgroundReading([(a, 0, 10), (a, 10, 20), (a, 15, 18), (a, 40, 50), (b, 50, 60), (a, 0, (1 << 20) + 5)])
    wait()
    assert asked == [(0, 20), (40, 10), (50, 10), (0, 1 << 20), (1 << 20, 5)]


def test_a_system_without_a_call_for_it_reads_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    (tmp_path / "a").write_bytes(bytes(1000))
    BackgroundReading([(tmp_path / "a", 0, 5000)])
    wait()


def test_a_file_that_is_gone_is_left_to_whoever_touches_it(tmp_path: Path) -> None:
    BackgroundReading([(tmp_path / "a", 0, 5000)])
    wait()


def test_more_than_half_of_the_memory_is_not_read_ahead(
    tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  8192 kB\n")
    assert page_cache.available_bytes(tmp_path / "meminfo") == 8 << 20
    assert page_cache.available_bytes(tmp_path / "none") > 1 << 60
    monkeypatch.setattr(page_cache, "available_bytes", lambda: 8 << 20)
    BackgroundReading([(tmp_path / "a", 0, 100 << 20)])
    wait()
    assert sum(count for _, count in asked) == 4 << 20


def test_what_was_just_read_is_in_the_cache_and_one_cold_sample_says_that_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    cold: set[int] = set()

    def look(_: int, buffers: list[bytearray], at: int, flags: int) -> int:
        assert [len(buffer) for buffer in buffers] == [1]
        assert flags == 8
        looked.append(at)
        if at in cold:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", look, raising=False)
    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x")
    parts = [(tmp_path / "a", 1000, 1500), (tmp_path / "a", 5000, 5010), (tmp_path / "b", 0, 770)]
    assert is_cached(parts)
    places = [*range(1000, 1500), *range(5000, 5010), *range(770)]
    assert looked == places[::20]
    cold.add(5000)
    looked.clear()
    assert not is_cached(parts)
    assert looked[-1] == 5000


def test_a_system_that_cannot_tell_what_is_in_its_cache_is_asked_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_cached([(tmp_path / "none", 0, 5)])
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.delattr(os, "preadv", raising=False)
    assert not is_cached([(tmp_path / "a", 0, 5)])
