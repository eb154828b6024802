"""Fixtures that tests of several formats use."""

from tests.support.harmful import harmful, marker

__all__ = ["harmful", "marker"]
