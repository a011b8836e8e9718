"""Draws charts in a terminal with rich: labels as a tree, figures, and a bar on the boot's axis for each row.

Where there is no terminal the same comes as plain text, labels whole, bars of BAR_WIDTH cells. Text of a file is shown
as text: rich's markup is not read, and what could drive a terminal is escaped already in the chart.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncvmm.timing.chart import Chart, Row
from asyncvmm.timing.text import duration_text, printable, share_text

BAR_WIDTH = 48
"""Cells of a bar where no terminal says how wide it is."""

PLAIN_WIDTH = 16384
"""Cells of a line where nothing must be cut: more than the longest label and its figures."""

_GUEST = "guest, up to each stage"
_RESTORE = "restore, up to each stage"
_GAP = 2
_LEAST_LABEL = 16
_LEAST_BAR = 12


@attrs.frozen
class Glyphs:
    """What bars are made of."""

    bar: str = "━"
    thin: str = "╸"
    gap: str = "┄"
    instant: str = "◆"
    beyond: str = "▸"


ASCII = Glyphs("=", "-", ".", "*", ">")
"""For outputs that have no more."""

_STYLES = {
    "phase": "blue",
    "residual": "dim",
    "stage": "green",
    "ready": "bold green",
    "mark": "magenta",
    "error": "bold red",
    "lost": "yellow",
}


def draw(chart: Chart, console: Console) -> None:
    """Print ``chart`` on ``console``."""
    title = Text(f"VM {chart.name}", style="bold")
    title.append(f"  {printable(chart.recording.source)}: {chart.headline}", style="not bold")
    console.print(title, soft_wrap=True)
    if chart.rows:
        console.print(_table(chart, console))
    else:
        console.print("no phases and no guest stages")
    for note in chart.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _table(chart: Chart, console: Console) -> Table:
    glyphs = Glyphs() if console.encoding.lower().startswith("utf") else ASCII
    labels, bar = _widths(chart, console)
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim", padding=(0, _GAP, 0, 0))
    table.add_column("host", no_wrap=True, overflow="ellipsis" if glyphs != ASCII else "crop", width=labels)
    for name in ("start", "took", "share") if bar else ("start", "took"):
        table.add_column(name, justify="right", no_wrap=True)
    if bar:
        table.add_column(_scale(chart, bar), no_wrap=True, width=bar)
    for title, rows in (("", chart.host), (_RESTORE, chart.restore), (_GUEST, chart.guest), ("events", chart.instants)):
        if title and rows:
            table.add_row(Text(title, style="dim"))
        for row in rows:
            cells = list(_cells(chart, row, bar, glyphs))
            table.add_row(*(cells if bar else cells[:3]))
    return table


def _widths(chart: Chart, console: Console) -> tuple[int, int]:
    """Cells of labels and of bars; 0 for bars where a terminal has no room for them."""
    titles = [len(title) for title, rows in ((_RESTORE, chart.restore), (_GUEST, chart.guest)) if rows]
    widest = max(titles + [len(_label(row)) for row in chart.rows])
    if not console.is_terminal:
        return widest, BAR_WIDTH
    figures = [[cell.cell_len for cell in _cells(chart, row, 0, ASCII)][1:4] for row in chart.rows]
    start, took, share = (max(5, *column) + _GAP for column in zip(*figures, strict=True))
    room = console.width - start - took - share - _GAP
    labels = min(widest, max(_LEAST_LABEL, room // 2))
    if room - labels >= _LEAST_BAR:
        return labels, room - labels
    return min(widest, max(_LEAST_LABEL // 2, console.width - start - took)), 0


def _scale(chart: Chart, width: int) -> Text:
    first, last = duration_text(chart.start_ns), duration_text(chart.end_ns)
    return Text(first + last.rjust(width - len(first)), style="dim")


def _label(row: Row) -> str:
    return "  " * (row.depth + (row.kind not in ("phase", "residual"))) + row.label + " (failed)" * row.failed


def _cells(chart: Chart, row: Row, width: int, glyphs: Glyphs) -> Iterator[Text]:
    style = "red" if row.failed else _STYLES[row.kind]
    dim = style if row.kind == "residual" else ""
    yield Text(_label(row), style="red" if row.failed or row.kind == "error" else dim)
    yield Text("" if row.off_axis_ns is not None else duration_text(row.start_ns), style=dim)
    yield Text("" if row.duration_ns is None else duration_text(row.duration_ns), style=dim)
    yield Text("" if row.duration_ns is None else share_text(row.duration_ns, chart.total_ns), style=dim)
    yield Text(_bar(chart, row, width, glyphs), style=style)


def _bar(chart: Chart, row: Row, width: int, glyphs: Glyphs) -> str:
    if row.off_axis_ns is not None:
        return f"{glyphs.beyond} off the axis: {duration_text(row.off_axis_ns)}"
    if row.duration_ns is None:
        beyond = row.start_ns > chart.end_ns
        return " " * _cell(chart, row.start_ns, width) + (glyphs.beyond if beyond else glyphs.instant)
    cells = [" "] * width
    for start_ns, end_ns in row.gaps or ((row.start_ns, row.end_ns),):
        first, last = _cell(chart, start_ns, width), _cell(chart, end_ns, width)
        glyph = glyphs.bar
        if row.kind == "residual":
            glyph = glyphs.gap
        elif chart.place(end_ns) - chart.place(start_ns) < 1 / max(1, width):
            glyph, last = glyphs.thin, first
        cells[first : last + 1] = [glyph] * (last + 1 - first)
    return "".join(cells).rstrip()


def _cell(chart: Chart, t_ns: int, width: int) -> int:
    return max(0, min(width - 1, int(chart.place(t_ns) * width)))
