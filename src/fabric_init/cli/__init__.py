"""The command line, ``fabric-init COMMAND``: one file per command, whose ``run`` takes its options as arguments."""


class CommandError(Exception):
    """A command failed for a reason that the user can fix. ``main`` prints it as one line, without a traceback."""
