"""Of a sweep, the sample runs, or all of it; and a sample that names what does not exist is an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.sweeps import leave_out_of_sample


class Item:
    """As much of a test as the sampling looks at."""

    def __init__(self, nodeid: str, marker: pytest.Mark | None) -> None:
        self.nodeid, self.marker = nodeid, marker

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marker


def left(mark: pytest.MarkDecorator | None, *arguments: str, whole: bool = False) -> list[str]:
    """Return which of six cases run."""
    deselected: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: whole, args=list(arguments), hook=hook)
    items: list[Any] = [Item(f"tests/test_a.py::test_a[{name}]", mark.mark if mark else None) for name in "abcdef"]
    every = [item.nodeid for item in items]
    leave_out_of_sample(config, items)
    assert sorted(item.nodeid for item in (*items, *deselected)) == every
    return [item.nodeid[-2] for item in items]


@pytest.mark.parametrize(
    ("mark", "sample"),
    [
        (None, "abcdef"),
        (pytest.mark.sweep, "abcdef"),
        (pytest.mark.sweep("e", "b"), "be"),
        (pytest.mark.sweep(every=4), "ae"),
        (pytest.mark.sweep(every=0), ""),
    ],
    ids=["no sweep", "asks for itself", "by ids", "one in four", "none"],
)
def test_the_sample_runs_and_with_whole_all(mark: pytest.MarkDecorator | None, sample: str) -> None:
    assert left(mark) == list(sample)
    assert left(mark, whole=True) == list("abcdef")


def test_a_case_that_is_named_runs_beside_the_sample() -> None:
    assert left(pytest.mark.sweep(every=0), "tests/test_a.py::test_a[c]") == ["c"]


def test_a_sample_of_cases_that_do_not_exist_is_an_error() -> None:
    with pytest.raises(pytest.UsageError, match=r"test_a names cases that it does not have: z"):
        left(pytest.mark.sweep("a", "z"))
