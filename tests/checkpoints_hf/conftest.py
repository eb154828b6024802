"""Prints how many classes load what ``from_pretrained`` loads, and by what reason the others do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints_hf.summary import lines

ANSWERS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
"""Where the tests leave what they were told."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ANSWERS] = []


@pytest.fixture(scope="session")
def told(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.config.stash[ANSWERS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first prints what all have found
        session.config.workeroutput["checkpoints_hf"] = session.config.stash[ANSWERS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[ANSWERS] += getattr(node, "workeroutput", {}).get("checkpoints_hf", [])


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if config.stash[ANSWERS]:
        terminalreporter.section("folders that transformers has saved")
        for line in lines(config.stash[ANSWERS]):
            terminalreporter.write_line(line)
