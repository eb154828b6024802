"""Renamed, joined, cut and permuted checkpoints: what loads is right, and so is what follows from a proposal.

With ``--whole`` 1,000 of them, else the first few. What an example is follows from its number: ``--first 1000`` runs
the next ones.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mangled.examples import run_example

WHOLE, SAMPLE, TOGETHER = 1000, 60, 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first" in metafunc.fixturenames:
        count = WHOLE if metafunc.config.getoption("--whole") else SAMPLE
        start = metafunc.config.getoption("--first")
        metafunc.parametrize("first", range(start, start + count, TOGETHER))


@pytest.mark.sweep
def test_nothing_is_silently_wrong(first: int, tmp_path: Path, counts: Counter[tuple[str, str]]) -> None:
    wrong = []
    for number in range(first, first + TOGETHER):
        answer = run_example(number, tmp_path)
        counts.update([("True", answer.outcome), ("False", answer.lenient)])
        if answer.wrong:
            wrong += [f"{number}, {answer.model}: {answer.done}", *(f"    {why}" for why in answer.wrong[:3])]
    assert not wrong, "\n".join(wrong)
