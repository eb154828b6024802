"""A headless Chromium, and what it sees of a page.

Whatever Chromium is there: the one that ``CHROME_PATH`` names, one on the PATH (Debian's packages
``chromium-headless-shell`` and ``chromium`` bring one), or the one that ``playwright install chromium`` fetched.
"""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
NONE_FOUND = "no Chromium: apt-get install chromium-headless-shell, or give the path of one in CHROME_PATH"


def find_browser(playwrights_own: str) -> str | None:
    """The executable to start; ``CHROME_PATH`` wins, whether it exists or not."""
    if given := os.environ.get("CHROME_PATH"):
        return given
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or (playwrights_own if Path(playwrights_own).exists() else None)


@contextmanager
def started() -> Iterator[Browser | None]:
    """The browser that is here, running; ``None`` if there is none."""
    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            yield None
        else:
            browser = playwright.chromium.launch(executable_path=path)
            yield browser
            browser.close()


class Seen:
    """One page, opened from its file, and everything that its console and its network said."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        self.page: Page = context.new_page()
        self.page.on("console", lambda message: self.console.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def colors(self, of: Locator | None = None) -> Counter[tuple[int, int, int]]:
        """How many pixels of a screenshot have which color."""
        picture = Image.open(io.BytesIO((of or self.page).screenshot())).convert("RGB")
        raw = picture.tobytes()
        return Counter(zip(raw[0::3], raw[1::3], raw[2::3], strict=True))

    def texts(self, selector: str) -> list[str]:
        """The text of every element that ``selector`` finds."""
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        wide: int = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return wide
