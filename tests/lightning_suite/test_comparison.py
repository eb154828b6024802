"""What `run.py` says of two runs, without Lightning's tests: these need a checkout, and a quarter of an hour."""

from __future__ import annotations

import pytest

from tests.lightning_suite import run
from tests.lightning_suite.run import Outcome, compare, expected, suite_of

PASSED, FAILED = Outcome("passed", ""), Outcome("failed", "AssertionError: 1 == 2")


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "expected", lambda: {"listed": "It counts callbacks."})


def test_equal_runs_and_listed_failures_are_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {"passes": PASSED, "fails": FAILED, "listed": PASSED}
    assert not compare("suite", theirs, {"passes": PASSED, "fails": FAILED, "listed": FAILED})
    assert "It counts callbacks." in capsys.readouterr().out


@pytest.mark.parametrize("ours", [{"passes": FAILED}, {}, {"passes": PASSED, "a file": FAILED}], ids=str)
def test_a_test_that_fails_or_is_gone_only_with_ours_is_a_difference(ours: dict[str, Outcome]) -> None:
    assert compare("suite", {"passes": PASSED}, ours)


def test_a_listed_test_that_passes_is_a_difference() -> None:
    assert compare("suite", {"listed": PASSED}, {"listed": PASSED})


def test_every_listed_test_has_a_reason_and_is_of_a_suite_that_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    reasons = expected()
    assert reasons
    assert all(reason.endswith(".") for reason in reasons.values())
    assert {suite_of(name) for name in reasons} <= set(run.SUITES)
