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

    Raises:
        pytest.UsageError: a sample names a case that its test does not have.
    """
    if config.getoption("--whole"):
        return
    sweeps: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") is not None:
            sweeps[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for test, cases in sweeps.items():
        all_are_here = not any("::" in argument for argument in config.args)
        left_out.update(_left_out(test, cases, all_are_here))
    left_out = {item for item in left_out if item.nodeid not in config.args}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _left_out(test: str, cases: list[pytest.Item], all_are_here: bool) -> set[pytest.Item]:
    marker = cases[0].get_closest_marker("sweep")
    assert marker is not None
    by_id = {case.nodeid.partition("[")[2].removesuffix("]"): case for case in cases}
    unknown = [name for name in marker.args if name not in by_id]
    if unknown and all_are_here:
        raise pytest.UsageError(f"the sample of {test} names cases that it does not have: {', '.join(unknown)}")
    named = [case for name, case in by_id.items() if not marker.args or name in marker.args]
    every = marker.kwargs.get("every", 1)
    return set(cases).difference(sampled(named, every) if every else [])
