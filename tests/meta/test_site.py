"""The documentation as a site: it builds without a warning, and its reference has every public name."""

from __future__ import annotations

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fabric_init.cli.main import COMMANDS
from tests.support.ranks import try_ranks

ROOT = Path(__file__).parents[2]
PUBLIC = [
    f"fabric_init{part}" for part in ("", ".checkpoints", ".strategies", ".tools", ".tools.forecast", ".tools.inspect")
]


def documented(page: str) -> set[str]:
    return set(re.findall(r"^\.\. auto(?:class|exception|function|data):: (\S+)$", page, re.MULTILINE))


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    there = set().union(*map(documented, pages))
    objects = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in there]
    public = importlib.import_module(module)
    missing = [name for name in public.__all__ if not any(getattr(public, name) is one for one in objects)]
    assert not missing, f"docs/api has no {module}: {', '.join(missing)}"


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_of(page: Path) -> str:
    parser = _Text()
    parser.feed(page.read_text(encoding="utf-8"))
    return " ".join("".join(parser.parts).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (built,) = try_ranks(1, build, folder=folder, seconds=300)
    assert (built.error, built.value) == ("", 0), built.error + built.output
    return folder / "html"


def build(folder: Path) -> int:
    """What ``sphinx-build`` does."""
    from sphinx.cmd.build import build_main

    options = ["-b", "html", "-n", "-W", "--keep-going", "-q", "-d", str(folder / "doctrees")]
    return build_main([*options, str(ROOT / "docs"), str(folder / "html")])


def test_the_site_has_a_page_for_every_file(site: Path) -> None:
    for page in (ROOT / "docs").glob("**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / name).is_file(), name


def test_signatures_and_descriptions_are_in_the_reference(site: Path) -> None:
    text = text_of(site / "api" / "fabric_init.html")
    assert "init_module(" in text
    assert "recorded init for every tensor that has no value yet" in text


def test_the_page_of_the_command_line_has_the_help_of_every_command(site: Path) -> None:
    text = text_of(site / "command_line.html")
    for command in COMMANDS:
        assert f"Usage: fabric-init {command}" in text
