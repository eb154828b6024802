"""The command line: ``fabric-init COMMAND``. One file a command, whose ``run`` has its options as arguments."""


class CommandError(Exception):
    """A command cannot go on, for a reason the user can fix. ``main`` prints it as one line, without a traceback."""
