"""Checkpoints under other names or in other shapes: renamed, selected, combined and converted."""
