"""Sweeps: more cases than every run can take. Without ``--whole`` a fixed sample of them runs.

    @pytest.mark.sweep("ddp-2", "fsdp2-4")    # the sample by its ids, as they stand in brackets
    @pytest.mark.sweep(every=7)               # one case in seven, the first among them
    @pytest.mark.sweep(every=0)               # no case
    @pytest.mark.sweep                        # the test asks for the fixture ``whole``: it has many cases in one

``tox -e sweeps`` runs all that is marked, whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import pytest

Case = TypeVar("Case")


def sampled(cases: Sequence[Case], every: int, first: int = 0) -> list[Case]:
    """Return one in ``every`` of ``cases``."""
    return list(cases[first::every])


def leave_out_of_sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take from ``items`` what the sweeps among them leave to ``--whole``.

    A case that is named on the command line runs, whether it is in the sample or not.
    """
    if config.getoption("--whole"):
        return
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") is not None:
            tests[item.nodeid.partition("[")[0]].append(item)
    kept = {item for cases in tests.values() for item in sample_of(cases)}
    left_out = {
        item for cases in tests.values() for item in cases if item not in kept and item.nodeid not in config.args
    }
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def sample_of(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Return the sample of the ``cases`` of one test."""
    marker = cases[0].get_closest_marker("sweep")
    assert marker is not None
    every = marker.kwargs.get("every", 1)
    ids = [case.nodeid.partition("[")[2].removesuffix("]") for case in cases]
    named = [case for case, name in zip(cases, ids, strict=True) if not marker.args or name in marker.args]
    return sampled(named, every) if every else []
