"""Ranks act together: all do the same, or all raise."""
