from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer

from fabric_init.cli import CommandError
from fabric_init.cli import main as cli
from fabric_init.errors import CheckpointMismatchError


def status_of(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def app_that_raises(error: Exception) -> typer.Typer:
    def run() -> int:
        """Fails."""
        raise error

    return cli.build_app({"fails": "Fails.", "fails-too": "Fails."}, lambda name: run)


def test_an_unknown_command_is_refused_with_the_way_to_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["finetune"]) == 2
    message = capsys.readouterr().err
    assert "No such command 'finetune'" in message
    assert "Try 'fabric-init -h' for help" in message


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of([]) == 2
    written = capsys.readouterr()
    assert "COMMAND" in written.out + written.err


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in cli.COMMANDS:
        about = cli.load_run(name).__doc__
        assert about is not None
        assert cli.COMMANDS[name] == about.splitlines()[0]
        assert f"{name} {about.splitlines()[0]}"[:50] in text


def test_every_option_of_every_command_has_a_help_text() -> None:
    for name in cli.COMMANDS:
        command = cli.build_command(name)
        assert command.help, name
        for option in command.params:
            assert option.help, f"{name} {option.name}"


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["--version"]) == 0
    assert capsys.readouterr().out == "fabric-init 0.1.0\n"


@pytest.mark.parametrize("error", [CommandError("no weights"), CheckpointMismatchError("no weights")])
def test_our_own_errors_become_one_line_and_status_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        app_that_raises(error)(args=["fails"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "fabric-init fails: no weights\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        app_that_raises(ZeroDivisionError("a bug"))(args=["fails"])


def test_python_dash_m_is_the_same_command_as_the_installed_script() -> None:
    (script,) = entry_points(group="console_scripts", name="fabric-init")
    assert script.load() is cli.main
    command = [sys.executable, "-m", "fabric_init", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "fabric-init 0.1.0\n"


def test_no_color_is_honoured() -> None:
    command = [sys.executable, "-m", "fabric_init", "--help"]
    terminal = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    terminal.pop("NO_COLOR", None)
    colored = subprocess.run(command, env=terminal, capture_output=True, text=True, check=True).stdout
    plain = subprocess.run(command, env={**terminal, "NO_COLOR": "1"}, capture_output=True, text=True, check=True)
    color = re.compile(r"\x1b\[[\d;]*3[0-7]")
    assert color.search(colored)
    assert not color.search(plain.stdout)


def test_the_shell_completes_commands() -> None:
    script = Path(sys.executable).with_name("fabric-init")
    asked = {**os.environ, "_FABRIC_INIT_COMPLETE": "complete_bash", "COMP_WORDS": "fabric-init d", "COMP_CWORD": "1"}
    answer = subprocess.run([str(script)], env=asked, capture_output=True, text=True, check=False).stdout
    assert answer.split() == ["demo"]


def test_help_and_completion_wait_for_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'lightning', 'numpy', 'safetensors'): sys.modules[name] = None\n"
        "from fabric_init.cli.main import main; main()"
    )
    asked = {**os.environ, "_FABRIC_INIT_COMPLETE": "complete_bash", "COMP_WORDS": "fabric-init inspect --man"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**asked, "COMP_CWORD": "2"}, capture_output=True, text=True, check=False
    )
    assert answer.stdout.split() == ["--manifest"], answer.stderr
    for command in ("inspect", "plan", "audit"):
        subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, check=True)
