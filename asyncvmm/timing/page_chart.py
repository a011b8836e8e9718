"""One boot of the page: what became of it, where its time went, its rows on the axis, and the same figures as a table.

Bars are inline SVG with lengths in percent, so that they follow the width of the page without any program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from asyncvmm.timing.chart import GUEST, RESIDUAL, Chart, Row
from asyncvmm.timing.markup import Markup, element
from asyncvmm.timing.text import duration_text, printable, share_text

COLOURS = 8
"""Colours that phases are told apart by."""

TICKS = 5
"""Marks on an axis at most."""

_LEGEND = 6
_LEGEND_LABEL = 32

Colours = Mapping[str, int]
"""The colour of each phase that has none in it, by name."""


def colours_of(charts: Sequence[Chart]) -> Colours:
    """Colours by the order in which phases come, the same for all boots."""
    names = dict.fromkeys(row.label for chart in charts for row in chart.host if row.kind == "phase" and row.leaf)
    return {name: number % COLOURS for number, name in enumerate(names)}


def span_of(charts: Sequence[Chart]) -> int:
    """The length of the axis that all boots share, ns: the longest boot."""
    return max((chart.span_ns for chart in charts), default=1)


def us(text: str) -> str:
    """``text`` with the sign for micro, which a page can show."""
    return text.replace(" us", " µs")


def article(chart: Chart, number: int, span_ns: int, colours: Colours, alone: bool) -> Markup:
    """The boot as an article of the page; ``span_ns`` is the length of the axis, ``alone`` if it is the only one."""
    heading = f"boot-{number}"
    return element(
        "article",
        element("h2", element("span", f"VM {chart.name}", class_="vm"), _badge(chart), id=heading),
        element("p", printable(chart.recording.source), class_="source"),
        _tiles(chart),
        _strip(chart, colours),
        _waterfall(chart, span_ns, colours),
        _notes(chart),
        _figures(chart, alone),
        class_="boot",
        aria_labelledby=heading,
    )


def _badge(chart: Chart) -> Markup:
    recording = chart.recording
    if recording.failed:
        return element("span", "failed", class_="badge bad")
    if recording.cancelled:
        return element("span", "cancelled", class_="badge")
    if recording.restore:
        return element("span", "restored", class_="badge good")
    ready = recording.ready_ns is not None
    return element("span", "ready" if ready else "not ready", class_="badge good" if ready else "badge")


def _tiles(chart: Chart) -> Markup:
    recording = chart.recording
    tiles = [(f"total {chart.total_spans}".rstrip(), us(duration_text(chart.total_ns)))]
    if recording.ready_ns is not None:
        tiles.append(("READY after", us(duration_text(max(0, recording.ready_ns - chart.start_ns)))))
    tiles += [(f"{stage} after", us(duration_text(ns))) for stage, ns in chart.restore_times]
    longest = max((row for row in chart.host if row.leaf and row.kind == "phase"), key=_took, default=None)
    if longest is not None:
        tiles.append(
            ("longest phase", f"{printable(longest.label, _LEGEND_LABEL)} {share_text(_took(longest), chart.total_ns)}")
        )
    residual = sum(_took(row) for row in chart.host if row.kind == "residual")
    if residual:
        tiles.append((RESIDUAL, f"{us(duration_text(residual))} · {share_text(residual, chart.total_ns)}"))
    if recording.accel:
        tiles.append(("machine", printable(recording.accel)))
    parts = [element("div", element("dt", name), element("dd", value)) for name, value in tiles]
    return element("dl", *parts, class_="tiles")


def _took(row: Row) -> int:
    return row.duration_ns or 0


def _strip(chart: Chart, colours: Colours) -> Markup | None:
    leaves = [row for row in chart.host if row.leaf and row.start_ns <= chart.end_ns]
    whole = sum(map(_took, leaves))
    if not whole:
        return None
    rects, reached = [], 0
    for row in leaves:
        rects.append(_rect(reached / whole, _took(row) / whole, _colour(row, colours)))
        reached += _took(row)
    biggest = sorted(leaves, key=_took, reverse=True)[:_LEGEND]
    legend = [
        element(
            "li",
            element("span", class_=f"swatch {_colour(row, colours)}"),
            f"{printable(row.label, _LEGEND_LABEL)} ",
            element("b", share_text(_took(row), whole)),
        )
        for row in biggest
    ]
    strip = element("svg", *rects, class_="strip", aria_hidden="true", width="100%", height=18)
    return element("div", strip, element("ul", *legend, class_="legend"), class_="where")


def _colour(row: Row, colours: Colours) -> str:
    if row.kind != "phase":
        return row.kind
    return f"c{colours[row.label]}" if row.leaf and row.label in colours else "outer"


def _waterfall(chart: Chart, span_ns: int, colours: Colours) -> Markup | None:
    if not chart.rows:
        return element("p", "no phases and no guest stages", class_="note")
    groups = (
        ("Host", chart.host),
        ("Restore, up to each stage", chart.restore),
        ("Guest, up to each stage", chart.guest),
        ("Events", chart.instants),
    )
    parts = [_axis(span_ns)]
    for name, rows in groups:
        if rows:
            items = [_row(chart, row, span_ns, colours) for row in rows]
            parts += [element("h3", name), element("ul", *items, class_="rows", aria_label=name)]
    return element("div", *parts, class_="waterfall", data_span=span_ns)


def ticks(span_ns: int) -> list[int]:
    """Round times from 0 to ``span_ns``, at most TICKS + 1 of them."""
    decade = 1
    while span_ns > TICKS * decade * 10:
        decade *= 10
    step = next(decade * by for by in (1, 2, 5, 10) if span_ns <= TICKS * decade * by)
    return list(range(0, span_ns + 1, step))


def _axis(span_ns: int) -> Markup:
    marks = []
    for tick in ticks(span_ns):
        place = tick / span_ns
        anchor = "end" if place > 0.95 else "start" if place < 0.05 else "middle"
        label = us(_tick_text(tick))
        marks.append(element("text", label, x=_percent(place), y=12, text_anchor=anchor, data_tick=tick))
    return element(
        "div", element("svg", *marks, width="100%", height=16, class_="ticks"), class_="axis", aria_hidden="true"
    )


def _tick_text(ns: int) -> str:
    for unit, name in ((1_000_000, "ms"), (1_000, "us")):
        if ns >= unit:
            return f"{ns / unit:g} {name}"
    return "0" if ns == 0 else f"{ns} ns"


def _row(chart: Chart, row: Row, span_ns: int, colours: Colours) -> Markup:
    start_ns = row.start_ns - chart.start_ns
    took = "" if row.duration_ns is None else us(duration_text(row.duration_ns))
    share = "" if row.duration_ns is None else share_text(row.duration_ns, chart.total_ns)
    grid = [
        element("line", x1=_percent(at / span_ns), x2=_percent(at / span_ns), y1=0, y2="100%") for at in ticks(span_ns)
    ]
    bar = element(
        "svg", element("g", *grid, class_="grid"), *_marks(chart, row, span_ns, colours), width="100%", height="100%"
    )
    label = element("span", row.label, " (failed)" if row.failed else None, class_=f"label d{min(row.depth, 8)}")
    return element(
        "li",
        label,
        element("span", took or _since_start(row, start_ns), class_="took"),
        element("span", share, class_="share"),
        element("span", bar, class_="bar", aria_hidden="true"),
        class_=f"row {row.kind}{' failed' if row.failed else ''}",
        tabindex=0,
        data_name=row.label,
        data_from=us(duration_text(row.start_ns)),
        data_to=None if row.duration_ns is None else us(duration_text(row.end_ns)),
        data_took=took or None,
        data_share=share or None,
        data_more=_more(chart, row),
        data_s=start_ns,
        data_e=start_ns + _took(row),
    )


def _since_start(row: Row, start_ns: int) -> str:
    return "" if row.off_axis_ns is not None else f"+{us(duration_text(max(0, start_ns)))}"


def _more(chart: Chart, row: Row) -> str | None:
    if row.off_axis_ns is not None:
        return f"off the axis: says {us(duration_text(row.off_axis_ns))}"
    if row.start_ns > chart.end_ns:
        return f"after the {chart.recording.what}"
    if row.reason is not None:
        return us(row.reason)
    if row.kind == "residual":
        return "what no phase inside accounts for"
    if row.path[:1] == (GUEST,):
        clock = chart.recording.clock
        return "placed by the arrival of its line" if clock is None else f"± {us(duration_text(clock.error_ns))}"
    return f"attempt {row.attempt}{', failed' if row.failed else ''}" if row.attempt or row.failed else None


def _marks(chart: Chart, row: Row, span_ns: int, colours: Colours) -> list[Markup]:
    scale = span_ns
    if row.duration_ns is None:
        beyond = row.off_axis_ns is not None or row.start_ns > chart.end_ns
        t_ns = chart.end_ns if beyond else row.start_ns
        place = min(1.0, max(0.0, (t_ns - chart.start_ns) / scale))
        shape = element("path", d="M-5 -5 L4 0 L-5 5 Z" if beyond else "M0 -6 L5 0 L0 6 L-5 0 Z")
        return [element("svg", shape, x=_percent(place), y="50%", class_=f"mark {row.kind}", overflow="visible")]
    colour = "bad" if row.failed else _colour(row, colours)
    rects = []
    for start_ns, end_ns in row.gaps or ((row.start_ns, row.end_ns),):
        first, last = (min(1.0, max(0.0, (t_ns - chart.start_ns) / scale)) for t_ns in (start_ns, end_ns))
        rects.append(_rect(first, max(0.0, last - first), f"span {colour}"))
    return rects


def _rect(x: float, width: float, class_: str) -> Markup:
    return element("rect", x=_percent(x), width=_percent(width), height="100%", class_=class_)


def _percent(part: float) -> str:
    return f"{part * 100:.4f}".rstrip("0").rstrip(".") + "%"


def _notes(chart: Chart) -> Markup | None:
    if not chart.notes:
        return None
    return element("ul", *(element("li", us(note)) for note in chart.notes), class_="notes")


def _figures(chart: Chart, alone: bool) -> Markup:
    head = element("tr", *(element("th", name, scope="col") for name in ("", "start", "took", "share")))
    body = [
        element(
            "tr",
            element("th", row.label, " (failed)" if row.failed else None, scope="row", class_=f"d{min(row.depth, 8)}"),
            element("td", "" if row.off_axis_ns is not None else us(duration_text(row.start_ns))),
            element("td", _took_text(row)),
            element("td", "" if row.duration_ns is None else share_text(row.duration_ns, chart.total_ns)),
        )
        for row in chart.rows
    ]
    caption = element("caption", f"VM {chart.name}: every row, times since the VM's start")
    table = element("table", caption, element("thead", head), element("tbody", *body))
    return element("details", element("summary", "Figures as a table"), table, class_="figures", open=alone)


def _took_text(row: Row) -> str:
    if row.off_axis_ns is not None:
        return f"{us(duration_text(row.off_axis_ns))}, off the axis"
    return "" if row.duration_ns is None else us(duration_text(row.duration_ns))
