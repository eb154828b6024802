"""What the pages for contributors say holds: quick tests, CI commands, files and layers of the architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import QUICK, SLOW, is_quick
from tests.meta.test_imports import LAYERS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
ARCHITECTURE = (ROOT / "docs/contributing/architecture.md").read_text(encoding="utf-8")
PACKAGES = sorted(path.parent.name for path in ROOT.glob("src/fabric_init/*/__init__.py"))


@pytest.mark.parametrize("name", PACKAGES)
def test_every_subpackage_has_quick_tests(name: str) -> None:
    files = [path.relative_to(TESTS).as_posix() for path in TESTS.glob(f"{name}/**/test_*.py")]
    assert any(map(is_quick, files))


def test_every_slow_group_and_every_exception_exists() -> None:
    gone = [pattern for pattern in (*SLOW, *QUICK) if not list(TESTS.glob(pattern))]
    assert gone == []


def test_every_sweep_is_in_the_table_of_sweeps() -> None:
    page = (ROOT / "docs/contributing/tests.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([a-z_/]+(?:\.py)?)` \|.*\|.*\|$", page, re.MULTILINE)
    marked = re.compile(r"^@pytest\.mark\.sweep", re.MULTILINE)
    files = {file.relative_to(TESTS) for file in TESTS.glob("**/test_*.py") if marked.search(file.read_text("utf-8"))}
    assert {path for path in named if not (TESTS / path).exists()} == set()
    assert {file for file in files if not any(file.is_relative_to(path) for path in named)} == set()


def test_every_environment_of_the_pages_exists() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs/contributing").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"tox -e ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert named <= set(re.findall(r"^\[testenv:([a-z-]+)\]$", (ROOT / "tox.ini").read_text("utf-8"), re.MULTILINE))
    assert "sweeps" in named


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    demo, tests = commands
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == tests
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"run: {demo}\n" in workflow
    assert "run: .ci/run\n" in workflow


def test_the_readme_says_where_to_start() -> None:
    assert "(CONTRIBUTING.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_and_folder_of_the_architecture_exists() -> None:
    named = re.findall(r"(?<![\w/.])((?:[a-z_]+/)+(?:[a-z_0-9]+\.py)?)(?![\w/])", ARCHITECTURE)
    assert len(named) > 30
    assert [path for path in named if not any((top / path).exists() for top in (ROOT / "src/fabric_init", ROOT))] == []
    alone = re.findall(r"(?<![\w/.])([a-z_0-9]+\.(?:py|js))(?!\w)", ARCHITECTURE)  # its folder is on the line above
    assert {name for name in alone if not list((ROOT / "src").rglob(name))} == set()
    assert "random_streams.py" in alone


def test_the_layers_of_the_architecture_are_those_of_the_check() -> None:
    lines = [", ".join(layer) for layer in reversed(LAYERS[:-1])]  # without __main__ and __init__, which start the rest
    assert "```\n" + "\n".join(lines) + "\n```" in ARCHITECTURE
