"""How many ranks a stack runs on: two, and with ``--whole`` four as well, which take minutes on two cores."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "ranks" in metafunc.fixturenames and not _is_parametrized(metafunc):
        metafunc.parametrize("ranks", [2, 4] if metafunc.config.getoption("--whole") else [2], scope="module")


def _is_parametrized(metafunc: pytest.Metafunc) -> bool:
    marks = metafunc.definition.iter_markers("parametrize")
    return any("ranks" in mark.args[0] for mark in marks)
