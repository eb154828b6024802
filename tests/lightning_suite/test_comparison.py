"""What `run.py` says of two runs, without Lightning's tests: these need a checkout, and a quarter of an hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import pytest

from tests.lightning_suite import run
from tests.lightning_suite.plugin import Outcomes
from tests.lightning_suite.run import Outcome, Session, compare, expected, read_outcomes, suite_of

PASSED, FAILED = Outcome("passed", ""), Outcome("failed", "AssertionError: 1 == 2")


@pytest.fixture(autouse=True)
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "expected", lambda: {"listed": "It counts callbacks."})


def test_what_fails_both_times_and_what_is_listed_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    ours = {"passes": PASSED, "fails": FAILED, "listed": FAILED}
    assert not compare("suite", ours, {"fails": FAILED, "listed": PASSED})
    assert "It counts callbacks." in capsys.readouterr().out


@pytest.mark.parametrize("theirs", [{"fails": PASSED}, {}], ids=["passes with theirs", "is not there with theirs"])
def test_a_test_that_fails_only_with_ours_is_a_difference(theirs: dict[str, Outcome]) -> None:
    assert compare("suite", {"passes": PASSED, "fails": FAILED}, theirs)


def test_a_listed_test_that_passes_is_a_difference() -> None:
    assert compare("suite", {"listed": PASSED}, {})


def test_what_was_kept_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    outcomes = {"ours": {"passes": PASSED, "fails[a\\b]": FAILED}, "theirs": {"fails[a\\b]": FAILED}}

    def ran(session: Session, paths: list[str], classes: str) -> dict[str, Outcome]:
        runs.append((paths, classes))
        return outcomes[classes]

    monkeypatch.setattr(Session, "_run", ran)
    session = Session(tmp_path, keep=tmp_path / "kept")
    assert (
        session.outcomes(["tests_fabric/a.py"]) == session.outcomes(["tests_fabric/a.py"]) == tuple(outcomes.values())
    )
    assert runs == [(["tests_fabric/a.py"], "ours"), (["fails[a\\b]"], "theirs")]


def test_every_listed_test_has_a_reason_and_is_of_a_suite_that_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    reasons = expected()
    assert reasons
    assert all(reason.endswith(".") for reason in reasons.values())
    assert {suite_of(name) for name in reasons} <= set(run.SUITES)


def test_the_worst_of_what_a_test_reports_is_its_outcome(tmp_path: Path) -> None:
    outcomes = Outcomes(str(tmp_path / "outcomes"))

    def report(name: str, **outcome_when: Literal["passed", "skipped", "failed"]) -> None:
        for when, outcome in outcome_when.items():
            outcomes.pytest_runtest_logreport(pytest.TestReport(name, ("", 0, ""), {}, outcome, None, cast(Any, when)))

    report("passes", setup="passed", call="passed", teardown="passed")
    report("is skipped", setup="skipped", teardown="passed")
    report("fails", setup="passed", call="failed", teardown="passed")
    report("fails late", setup="passed", call="skipped", teardown="failed")
    found = read_outcomes((tmp_path / "outcomes").read_text(encoding="utf-8"))
    assert {name: outcome.outcome for name, outcome in found.items()} == {
        "passes": "passed",
        "is skipped": "skipped",
        "fails": "failed",
        "fails late": "failed",
    }
