"""Prints what came of the faults."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.faults.examples import OUTCOMES, Answer, Example

ANSWERS: pytest.StashKey[list[tuple[int, Answer]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ANSWERS] = []


@pytest.fixture(scope="session")
def answers(request: pytest.FixtureRequest) -> list[tuple[int, Answer]]:
    return request.config.stash[ANSWERS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[ANSWERS]
    if found:
        terminalreporter.section("faults on ranks")
        counts = Counter(answer.outcome for _, answer in found)
        terminalreporter.write_line(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
        for seed, answer in found:
            if answer.outcome not in OUTCOMES[:2]:
                terminalreporter.write_line(f"{answer.outcome}: {Example.of(seed)}: {answer.why[:300]}")
