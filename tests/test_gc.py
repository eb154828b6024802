"""The collector rests in blocks, and what a user has frozen stays frozen."""

from __future__ import annotations

import gc

import pytest

from fabric_init._gc import PausedCollector


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of ``gc`` that moves objects or counts them, of a process that has frozen nothing."""
    calls: list[str] = []
    for name in ("freeze", "unfreeze", "get_freeze_count"):
        monkeypatch.setattr(gc, name, lambda name=name: calls.append(name) or 0)
    monkeypatch.setattr(PausedCollector, "_some_are_frozen", False)
    return calls


def test_the_collector_rests_in_a_block_and_works_again_after_the_outer_one() -> None:
    with PausedCollector():
        with PausedCollector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_has_come_to_life_is_old_after_the_block(called: list[str]) -> None:
    with PausedCollector(), PausedCollector():
        assert called == []
    assert called == ["get_freeze_count", "freeze", "unfreeze"]


def test_frozen_objects_stay_frozen_and_are_counted_once(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: called.append("count") or 1000)
    for _ in range(3):
        with PausedCollector():
            pass
    assert called == ["count"]
