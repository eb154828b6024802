"""The directive ``command-help``: what every command says to ``--help``, word for word, one section a command."""

import io
import os
from contextlib import redirect_stdout
from importlib import import_module
from unittest.mock import patch

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fabric_init.cli.main import COMMANDS, build_app

_PLAIN = {"COLUMNS": "84", "NO_COLOR": "1", "TERM": "dumb"}


def help_of(command: str) -> str:
    """What a terminal of 84 columns shows."""
    with patch.dict(os.environ, _PLAIN), redirect_stdout(io.StringIO()) as output:
        build_app()(args=[command, "--help"], prog_name="fabric-init", standalone_mode=False)
    shown = output.getvalue()
    return "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())


class CommandHelp(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        for name in COMMANDS:  # a page that is there already is made anew when a command changes
            self.env.note_dependency(str(import_module(f"fabric_init.cli.{name}").__file__))
        return [self._section(command) for command in COMMANDS]

    def _section(self, command: str) -> nodes.Node:
        text = help_of(command)
        title = nodes.title("", "", nodes.literal(text=f"fabric-init {command}"))
        return nodes.section("", title, nodes.literal_block(text, text, language="text"), ids=[command])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
