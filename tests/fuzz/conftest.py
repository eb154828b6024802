"""What the fuzz run needs, and the table of what it ran."""

from __future__ import annotations

from typing import Any

import pytest

ROWS = pytest.StashKey[list[str]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[str]:
    """Its rows are printed when all is done."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the table is printed by the first
        session.config.workeroutput["mutated checkpoints"] = session.config.stash.get(ROWS, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(ROWS, []).extend(getattr(node, "workeroutput", {}).get("mutated checkpoints", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("mutated checkpoints")
        terminalreporter.write_line("\n".join(rows))
