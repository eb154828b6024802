"""Faults on one rank: all ranks end, with an error that says why, or all with the right values.

With ``--whole`` 500 of them (``tox -e faults``), else a few of all kinds; ``--example SEED`` runs one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.examples import CLEAR, SURVIVED, Answer, Example, run

SAMPLE = (4, 6, 102, 114, 120, 127, 202, 207, 227, 229)
"""A wrong shape, another dtype in the file, ``CancelledError`` in two places, a skipped block, another file, none, one
in another dtype, a killed rank, and another way."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        one = metafunc.config.getoption("--example")
        seeds = [one] if one is not None else range(500) if metafunc.config.getoption("--whole") else SAMPLE
        metafunc.parametrize("seed", seeds)


def test_a_fault_on_one_rank_is_survived_or_clear_on_all(
    seed: int, tmp_path: Path, answers: list[tuple[int, Answer]]
) -> None:
    answer = run(seed, tmp_path)
    answers.append((seed, answer))
    assert answer.outcome in (SURVIVED, CLEAR), f"{Example.of(seed)}: {answer.why}"
