"""Lightning's Trainer warns of what torch has deprecated, and of what small tests do without."""

from __future__ import annotations

import pytest

_WARNINGS = (
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers:UserWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "trainer":
            for warning in _WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
