"""An object whose pickle runs code, and what that code would leave behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
