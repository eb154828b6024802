"""What writes checkpoints of every format lies beside the tests of readers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("checkpoints", "distributed", "fuzz")]


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What must not come to exist."""
    return tmp_path / "code was run"


@pytest.fixture
def harmful(marker: Path) -> object:
    """An object whose pickle runs code."""
    return Harmful(marker)
