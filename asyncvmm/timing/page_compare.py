"""The comparison of a page: what moved, in sentences and as a table with a small drawing of each phase."""

from __future__ import annotations

from collections.abc import Iterator

from asyncvmm.timing.compare import Comparison, Delta, Line, Spread, delta_text
from asyncvmm.timing.compare_table import group_text, spread_text
from asyncvmm.timing.markup import Markup, element
from asyncvmm.timing.page_chart import COLOURS, us
from asyncvmm.timing.text import duration_text

_LANE = 9
"""Height of one group in a drawing, px."""


def comparison_section(comparison: Comparison) -> Markup:
    """The section that compares the groups."""
    several = len(comparison.groups) > 1
    groups = [
        element("li", element("span", class_=f"swatch c{number % COLOURS}"), f"[{number + 1}] {group_text(group)}")
        for number, group in enumerate(comparison.groups)
    ]
    conclusions = [element("li", us(conclusion)) for conclusion in comparison.conclusions]
    return element(
        "section",
        element("h2", "What moved" if several else "Spread", id="compare"),
        element("ul", *conclusions, class_="conclusions") if conclusions else None,
        element("ul", *groups, class_="legend"),
        element("p", "Each phase over the boots; a difference within the spread is no move.", class_="hint"),
        element("div", _table(comparison), class_="scroll", tabindex=0, role="region", aria_label="Comparison"),
        class_="compare",
        aria_labelledby="compare",
    )


def _table(comparison: Comparison) -> Markup:
    several = len(comparison.groups) > 1
    heads = ["", "median and range" if not several else "medians and ranges"]
    for number in range(1, len(comparison.groups) + 1):
        heads += [f"[{number}] median" if several else "median"]
        heads += ["min..max"] * comparison.spread
        heads += ["against [1]"] * (number > 1)
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    body = [element("tr", *_cells(line, comparison.spread)) for line in comparison.lines]
    return element("table", element("thead", head), element("tbody", *body), aria_labelledby="compare")


def _cells(line: Line, ranges: bool) -> Iterator[Markup]:
    label = f"guest {line.label}" if line.guest else line.label
    yield element("th", label, scope="row", class_=f"d{min(line.depth, 8)}")
    yield element("td", _drawing(line), class_="drawing")
    for number, (spread, delta) in enumerate(zip(line.spreads, line.deltas, strict=True)):
        yield element("td", "" if spread is None else us(duration_text(spread.median)))
        if ranges:
            yield element("td", "" if spread is None else us(spread_text(spread)), class_="range")
        if number:
            yield _delta(delta)


def _delta(delta: Delta | None) -> Markup:
    if delta is None:
        return element("td", "")
    verdict = None if delta.verdict == "spread unknown" else element("span", delta.verdict, class_="verdict")
    kind = "moved" if delta.verdict == "moved" else None
    return element("td", us(delta_text(delta)), " " if verdict else None, verdict, class_=kind)


def _drawing(line: Line) -> Markup:
    most = max((spread.most for spread in line.spreads if spread is not None), default=0) or 1
    lanes = [_lane(spread, number, most) for number, spread in enumerate(line.spreads) if spread is not None]
    return element("svg", *lanes, width="100%", height=_LANE * len(line.spreads) + 2, aria_hidden="true")


def _lane(spread: Spread, number: int, most: int) -> Markup:
    y, colour = _LANE * number + 2, f"c{number % COLOURS}"
    middle = y + _LANE / 2 - 1
    return element(
        "g",
        element("rect", x=0, y=y, height=_LANE - 2, width=f"{spread.median / most * 96:.3f}%", class_=colour),
        element(
            "line",
            x1=f"{spread.least / most * 96:.3f}%",
            x2=f"{spread.most / most * 96:.3f}%",
            y1=middle,
            y2=middle,
            class_="whisker",
        ),
    )
