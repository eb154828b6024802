"""Prints what came of the mangled checkpoints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.mangled.examples import OUTCOMES

COUNTS: pytest.StashKey[Counter[tuple[str, str]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Counter[tuple[str, str]]:
    return request.config.stash[COUNTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first prints what all have found
        found = session.config.stash[COUNTS]
        session.config.workeroutput["mangled"] = [[*kind, count] for kind, count in found.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for strict, outcome, count in getattr(node, "workeroutput", {}).get("mangled", []):
        node.config.stash[COUNTS][strict, outcome] += count


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    found = config.stash[COUNTS]
    if found:
        terminalreporter.section("mangled checkpoints")
        terminalreporter.write_line("strict=True  strict=False")
        for outcome in OUTCOMES:
            terminalreporter.write_line(f"{found['True', outcome]:11}  {found['False', outcome]:12}  {outcome}")
