"""The page in a real browser: quiet, asking nobody, as wide as a phone, readable in light and in dark, and alive.

Pictures are kept in ASYNCVMM_ARTIFACTS, or .cache/artifacts of the checkout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncvmm.timing.chart import lay_out
from asyncvmm.timing.compare import compare, group
from asyncvmm.timing.page import page
from asyncvmm.timing.reading import read_recordings
from tests.support.browser import Pipe, Tab, browser, new_tab
from tests.support.recordings import MS, boot, line, phase
from tests.support.requirements import ROOT, require

ARTIFACTS = Path(os.environ.get("ASYNCVMM_ARTIFACTS", ROOT / ".cache" / "artifacts"))
PHONE, DESKTOP = (390, 844), (1280, 900)
NASTY = "</script><img src=http://example.invalid/x onerror=alert(1)>" + "very_long_name_" * 10


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipe]:
    """One browser for all tests here."""
    require("chromium")
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def tab(pipe: Pipe) -> Tab:
    """A page of its own for each test."""
    return new_tab(pipe)


def written(directory: Path, *files: list[bytes]) -> Path:
    charts = [[lay_out(one) for one in read_recordings(lines, "boot.jsonl").recordings] for lines in files]
    groups = [group(f"boots-{number}.jsonl", some) for number, some in enumerate(charts)]
    path = directory / "page.html"
    path.write_text(page([chart for some in charts for chart in some], compare(groups)), "utf-8")
    return path


def many(name: str, wait_ms: int) -> list[bytes]:
    return [event for number in range(5) for event in boot(f"{name}{number}", wait_ms + 3 * number)]


def hostile() -> list[bytes]:
    failed = [line("vm.error", 90 * MS, what=NASTY), line("guest.exit", 9000 * MS, code=1)]
    return [phase(NASTY, 50 * MS, 2 * MS, "boot_wait"), *boot(), *failed]


PAGES = {
    "one": lambda: [boot()],
    "compared": lambda: [many("a", 80), many("b", 120)],
    "hostile": lambda: [hostile()],
}


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_it_is_quiet_asks_nobody_and_fits(
    tab: Tab, tmp_path: Path, name: str, scheme: str, size: tuple[int, int]
) -> None:
    path = written(tmp_path, *PAGES[name]())
    tab.open(path, *size, scheme)
    tab.picture(ARTIFACTS / f"timeline-{name}-{'phone' if size == PHONE else 'desktop'}-{scheme}.png")
    assert tab.complaints == []
    assert tab.requests == [path.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == size[0]
    assert tab.evaluate("[...document.querySelectorAll('.row .bar > svg')].every(bar => bar.clientWidth > 100)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(tab: Tab, tmp_path: Path, scheme: str) -> None:
    tab.open(written(tmp_path, boot()), *PHONE, scheme)
    luminance = """(colour => { const [r, g, b] = colour.match(/[0-9.]+/g).map(Number).map(v => (v /= 255) <= 0.04045
        ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; })"""
    for selector in (".label", ".source", ".legend", ".badge", ".row.residual .label", "td", "caption"):
        front = tab.evaluate(f"{luminance}(getComputedStyle(document.querySelector('{selector}')).color)")
        back = tab.evaluate(f"{luminance}(getComputedStyle(document.querySelector('.boot')).backgroundColor)")
        contrast = (max(front, back) + 0.05) / (min(front, back) + 0.05)
        assert contrast >= 3.5 if selector == ".badge" else contrast >= 4.5, selector  # WCAG 2.2, 1.4.3


def test_a_row_tells_its_figures_under_the_pointer_and_in_focus(tab: Tab, tmp_path: Path) -> None:
    tab.open(written(tmp_path, boot()), *DESKTOP, "light")
    x, y = tab.evaluate(
        "(box => [box.x + 30, box.y + 5])([...document.querySelectorAll('.row')]"
        ".find(row => row.dataset.name === 'boot_wait').getBoundingClientRect())"
    )
    tab.point(x, y)
    tip = "document.getElementById('tip').innerText"
    assert tab.evaluate(tip).split("\n") == ["boot_wait", "80.0 ms, 80.8% of the total", "16.0 ms to 96.0 ms"]
    tab.picture(ARTIFACTS / "timeline-details-desktop-light.png", whole=False)
    tab.point(1, 1)
    assert tab.evaluate("document.getElementById('tip').hidden")
    tab.press("Tab")
    assert tab.evaluate(tip).startswith("total")


def test_enter_zooms_to_a_row_and_escape_shows_the_whole_again(tab: Tab, tmp_path: Path) -> None:
    tab.open(written(tmp_path, boot()), *DESKTOP, "light")
    row = "[...document.querySelectorAll('.row')].find(row => row.dataset.name === 'qemu_fork')"
    width = f"{row}.querySelector('rect').getBoundingClientRect().width"
    before = tab.evaluate(width)
    tab.evaluate(f"{row}.focus()")
    tab.press("Enter")
    assert tab.evaluate(width) > 20 * before
    tab.picture(ARTIFACTS / "timeline-zoomed-desktop-light.png", whole=False)
    assert tab.evaluate("document.querySelector('.whole').textContent") == "Show the whole boot"
    tab.press("Escape")
    assert tab.evaluate(width) == before
    assert tab.evaluate("document.querySelector('.whole')") is None
    assert tab.complaints == []
