from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from fabric_init.cli import Command, CommandError
from fabric_init.cli import main as cli
from fabric_init.errors import CheckpointMismatchError


def command_that_raises(error: Exception) -> Command:
    def run(_: object) -> int:
        raise error

    return Command("fails", "fails", "fails", lambda parser: None, run)


def test_an_unknown_command_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["finetune"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "invalid choice: 'finetune'" in message
    assert "demo" in message


def test_no_command_at_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_help_lists_every_command_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for command in cli.COMMANDS:
        assert f"{command.name} {command.summary}" in text


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == "fabric-init 0.1.0\n"


@pytest.mark.parametrize("error", [CommandError("no weights"), CheckpointMismatchError("no weights")])
def test_our_own_errors_become_one_line_and_status_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (command_that_raises(error),))
    assert cli.main(["fails"]) == 1
    assert capsys.readouterr().err == "fabric-init fails: no weights\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (command_that_raises(ZeroDivisionError("a bug")),))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["fails"])


def test_python_dash_m_is_the_same_command_as_the_installed_script() -> None:
    (script,) = entry_points(group="console_scripts", name="fabric-init")
    assert script.load() is cli.main
    command = [sys.executable, "-m", "fabric_init", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "fabric-init 0.1.0\n"
