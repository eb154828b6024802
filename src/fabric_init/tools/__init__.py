"""Tools that look at models, recordings and checkpoints, and never fill anything."""

from fabric_init.tools.dump_tape import dump_tape

__all__ = ["dump_tape"]
