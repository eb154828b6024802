"""Pages as a person sees them: opened from their file in a headless browser, looked at, clicked on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.reports.html.audits import bad_audit
from tests.reports.html.browser import NONE_FOUND, Seen, started
from tests.reports.html.example import HOSTILE, ROWS, example_page
from tests.reports.html.init_reports import mixed_report

Color = tuple[int, int, int]
BLUE, ORANGE = (59, 130, 214), (224, 114, 46)  # the first two colors of every plot
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as found:
        if found is None and "REQUIRE_BROWSER" not in os.environ:
            pytest.skip(NONE_FOUND)
        assert found is not None, NONE_FOUND
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page größe.html"
    example_page().save(path)
    return path


@pytest.fixture(scope="module")
def seen(browser: Browser, path: Path) -> Seen:
    return Seen(browser, path)


def near(pixels: Counter[Color], color: Color) -> int:
    """How many pixels look like ``color``, which may be mixed with what is behind it."""
    return sum(n for c, n in pixels.items() if max(abs(a - b) for a, b in zip(c, color, strict=True)) < 60)


def names(seen: Seen) -> list[str]:
    """The first column of the table, as far as it is drawn."""
    return seen.texts("tbody td:first-child")


def test_nothing_goes_wrong_and_nothing_is_fetched(seen: Seen, path: Path) -> None:
    assert seen.console == []
    assert seen.requests[0] == path.as_uri()
    assert all(url.startswith("blob:") for url in seen.requests[1:])  # the plotting code, unpacked


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, PHONE], ids=["light", "dark", "phone"])
def test_the_page_of_an_audit_is_drawn_whole(browser: Browser, tmp_path: Path, options: dict[str, Any]) -> None:
    bad_audit().save(tmp_path / "audit.html")
    seen = Seen(browser, tmp_path / "audit.html", **options)
    assert seen.console == []
    assert seen.overflow() == 0
    assert seen.texts(".card .level") == ["error", "error", "warning", "note"]
    variance, stds, wasted = seen.page.locator(".drawing").all()
    assert min(seen.colors(variance)[BLUE], seen.colors(variance)[ORANGE]) > 50
    assert near(seen.colors(stds), BLUE) > 50
    assert seen.colors(wasted)[ORANGE] > 500
    assert {"activations", "gradients", "variance", "1 / √inputs"} <= set(seen.texts(".drawing text"))
    seen.page.get_by_role("searchbox").fill("lm_head")
    assert names(seen) == ["lm_head.weight"]


@pytest.mark.parametrize("options", [{}, PHONE], ids=["light", "phone"])
def test_the_page_of_an_init_report_is_drawn_whole(browser: Browser, tmp_path: Path, options: dict[str, Any]) -> None:
    report, _ = mixed_report(tmp_path)
    report.save(tmp_path / "report.html")
    seen = Seen(browser, tmp_path / "report.html", **options)
    assert seen.console == []
    assert seen.overflow() == 0
    assert "NaN or infinity in 1 tensor" in " ".join(seen.texts(".card h2"))
    sources, stds, saved = seen.page.locator(".drawing").all()
    assert min(seen.colors(sources)[ORANGE], seen.colors(saved)[ORANGE]) > 500
    assert near(seen.colors(stds), BLUE) > 20
    assert {"loaded", "initialized", "std now"} <= set(seen.texts(".drawing text"))
    assert len(names(seen)) == len(report.rows)


def test_every_plot_is_drawn_with_its_lines_and_its_words(seen: Seen) -> None:
    drawings = seen.page.locator(".drawing")
    assert drawings.count() == 3
    for drawing, colors in zip(drawings.all(), ((BLUE, ORANGE), (BLUE, ORANGE), (ORANGE,)), strict=True):
        pixels = seen.colors(drawing)
        for color in colors:
            assert near(pixels, color) > 100, f"{color} is not in {pixels.most_common(8)}"
    words = seen.texts(".drawing text")
    assert {"variance", "activations", "gradients", "expected std", "std now", "rule 3", "elements"} <= set(words)
    assert "zeros_() at a.py:1" in words


def test_what_a_point_is_comes_up_when_it_is_pointed_at(seen: Seen) -> None:
    seen.page.locator(".drawing").nth(1).scroll_into_view_if_needed()
    seen.page.locator(".drawing").nth(1).locator(".points path").first.hover(force=True)
    label = seen.page.locator(".hoverlayer .hovertext")
    expect(label).to_contain_text("layers.0")
    expect(label).to_contain_text("and 36 more")


def test_hostile_names_are_only_ever_shown(seen: Seen) -> None:
    assert seen.page.title() == f"Example {HOSTILE}"
    assert seen.page.locator("img").count() == 0
    assert seen.texts("h1") == [f"Example {HOSTILE}"]
    assert HOSTILE in seen.texts(".card code")
    assert HOSTILE in seen.texts("tbody tr:nth-child(8) td:first-child")


def test_findings_come_before_plots_and_wear_the_color_of_their_level(seen: Seen) -> None:
    assert seen.texts(".card .level") == ["error", "warning", "note"]
    tops = [seen.page.locator(selector).first.bounding_box() for selector in (".facts", ".card", ".plot", "table")]
    heights = [box["y"] for box in tops if box is not None]
    assert len(heights) == 4
    assert heights == sorted(heights)
    borders = [
        card.evaluate("card => getComputedStyle(card).borderLeftColor") for card in seen.page.locator(".card").all()
    ]
    assert len(set(borders)) == 3


def test_a_long_table_is_drawn_as_far_as_one_scrolls(browser: Browser, path: Path) -> None:
    seen = Seen(browser, path)
    assert 0 < len(names(seen)) < ROWS / 2
    assert seen.texts(".controls output") == [f"{ROWS:,} of {ROWS:,}"]
    while (drawn := len(names(seen))) < ROWS:
        seen.page.evaluate("window.scrollTo(0, document.documentElement.scrollHeight)")
        expect(seen.page.locator("tbody tr").nth(drawn)).to_be_attached()
    assert names(seen)[-1] == f"layers.{ROWS - 1}.weight"


def test_the_table_sorts_by_value_and_not_by_text(browser: Browser, path: Path) -> None:
    seen = Seen(browser, path)
    heading = seen.page.get_by_role("button", name="std")
    heading.click()
    stds = seen.texts("tbody td:nth-child(3)")
    assert stds[:4] == ["nan", "inf", "0.696", "0.695"], "the worst first, then the largest"
    heading.click()
    assert seen.texts("tbody td:nth-child(3)")[:3] == ["0", "0.001", "0.002"]
    assert seen.page.locator("th[aria-sort=ascending]").count() == 1


def test_the_table_is_searched_by_words_and_filtered_by_choice(browser: Browser, path: Path) -> None:
    seen = Seen(browser, path)
    seen.page.get_by_role("searchbox").fill("LAYERS.12 weight")
    assert names(seen)[0] == "layers.12.weight"
    assert all("layers.12" in name for name in names(seen))
    before = len(names(seen))
    seen.page.get_by_role("combobox", name="status").select_option("initialized")
    assert 0 < len(names(seen)) < before
    assert set(seen.texts("tbody td:nth-child(2)")) == {"initialized"}
    seen.page.get_by_role("searchbox").fill("no such tensor")
    assert names(seen) == []
    assert seen.texts(".controls output") == [f"0 of {ROWS:,}"]


def test_several_texts_in_a_cell_unfold(seen: Seen) -> None:
    cell = seen.page.locator("tbody tr:nth-child(4) td:last-child")
    line = cell.get_by_text("normal_(std=2) at model.py:2")
    assert not line.is_visible()
    cell.locator("summary").click()
    assert line.is_visible()


def test_it_is_dark_where_the_reader_likes_it_dark(browser: Browser, path: Path, seen: Seen) -> None:
    dark = Seen(browser, path, color_scheme="dark")
    for page, bright in ((seen, True), (dark, False)):
        ground = page.colors().most_common(1)[0][0]
        assert (min(ground) > 200) if bright else (max(ground) < 60)
        words = page.page.locator(".drawing text").first.evaluate("text => getComputedStyle(text).fill")
        assert words == ("rgb(28, 35, 48)" if bright else "rgb(230, 234, 240)")
    dark.page.emulate_media(color_scheme="light")  # and follows when the reader changes over
    expect(dark.page.locator(".drawing text").first).to_have_css("fill", "rgb(28, 35, 48)")
    assert dark.console == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, path: Path) -> None:
    seen = Seen(browser, path, **PHONE)
    assert seen.console == []
    assert seen.overflow() == 0
    assert seen.colors(seen.page.locator(".drawing").first)[BLUE] > 50
    seen.page.get_by_label("Sort by").select_option("std")
    assert "0.696" in seen.texts("tbody tr:nth-child(3) td:nth-child(3)")


def test_without_its_plotting_code_a_page_says_so_and_still_has_its_table(
    browser: Browser, path: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.html"
    text = path.read_text(encoding="utf-8")
    start = text.index('id="plotting">') + len('id="plotting">')
    broken.write_text(text[:start] + text[text.index("</script>", start) :], encoding="utf-8")
    seen = Seen(browser, broken)
    assert all(text.startswith("Not drawn: ") for text in seen.texts(".drawing"))
    assert names(seen)[1] == "layers.1.weight"
    assert any(message.startswith("uncaught: ") for message in seen.console)
