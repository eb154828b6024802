from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from fabric_init.cli.console import count_text, printable

SHOW = """
from fabric_init.cli import console
out = console.out()
table = console.new_table(out, "name", "bytes", right=["bytes"])
table.add_row("[bold]a.very.long.name.of.a.tensor.that.is.wider.than.the.terminal." + "x" * 60, "12")
table.add_row("b", "3,000", style="red")
out.print(table)
"""


def shown(terminal: bool, **environment: str) -> str:
    """What a process prints, to a pipe or to a terminal of 80 columns."""
    variables = {**os.environ, "TERM": "xterm-256color", **environment}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        if name not in environment:
            variables.pop(name, None)
    if not terminal:
        return subprocess.run(
            [sys.executable, "-c", SHOW], env=variables, capture_output=True, text=True, check=True
        ).stdout
    controller, end = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SHOW], env=variables, stdout=end, stdin=end) as process:
        os.close(end)
        written = io.BytesIO()
        try:
            while block := os.read(controller, 4096):
                written.write(block)
        except OSError:  # Linux says so when the other end is closed
            pass
    os.close(controller)
    assert process.returncode == 0
    return written.getvalue().decode()


def test_a_pipe_gets_plain_text_of_which_nothing_is_cut() -> None:
    text = shown(terminal=False)
    head, first, second = text.splitlines()
    assert head.split() == ["name", "bytes"]
    assert first.split() == [
        "[bold]a.very.long.name.of.a.tensor.that.is.wider.than.the.terminal." + "x" * 60,
        "12",
    ]
    assert second.split() == ["b", "3,000"]


def test_a_terminal_gets_lines_of_its_width_and_colors() -> None:
    text = shown(terminal=True)
    assert "\x1b[31m" in text
    plain = text.replace("\x1b[31m", "").replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert max(map(len, plain.splitlines())) <= 80
    assert "".join(plain.split()).count("x") >= 60


def test_no_color_is_honoured_on_a_terminal() -> None:
    assert "\x1b[31m" not in shown(terminal=True, NO_COLOR="1")


def test_forced_colors_leave_lines_whole() -> None:
    assert "x" * 60 in shown(terminal=False, FORCE_COLOR="1")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9_216, "9,216"), (10_000, "10.0 K"), (70_553_706_496, "70.6 B"), (10**12, "1.0 T")],
)
def test_counts_are_exact_while_short(count: int, text: str) -> None:
    assert count_text(count) == text


def test_control_characters_from_a_file_do_not_reach_the_terminal() -> None:
    assert printable("größe.\x1b[2J\n") == "größe.\\x1b[2J\\n"
