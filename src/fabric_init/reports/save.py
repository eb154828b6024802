"""Write a report to a file, as a page or JSON by its suffix."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fabric_init.errors import OptionError


class SavesItself(Protocol):
    """A page; its module is imported and it is built on request only."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to ``path``."""
        ...


def is_page(path: str | os.PathLike[str]) -> bool:
    """Return whether a report saved to ``path`` is an HTML page: its name ends in ``.html`` or ``.htm``."""
    return Path(path).suffix.lower() in (".html", ".htm")


def save_report(
    path: str | os.PathLike[str], data: Callable[[], dict[str, Any]], page: Callable[[], SavesItself]
) -> None:
    """Write ``page()`` where ``path`` ends in ``.html``, and ``data()`` where it ends in ``.json``.

    Raises:
        OptionError: ``path`` ends in something else.
        FabricInitError: a page is requested, but Plotly is not installed.
    """
    if is_page(path):
        page().save(path)
    elif Path(path).suffix.lower() != ".json":
        raise OptionError(f"{os.fspath(path)!r}: a report is saved as .html or .json; end its name in one of these")
    else:
        Path(path).write_text(json.dumps(data(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
