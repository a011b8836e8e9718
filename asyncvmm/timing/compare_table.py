"""Draws a comparison in a terminal: a line for each phase, for each group its median and spread, and what moved."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from asyncvmm.timing.compare import Comparison, Delta, Group, Line, Spread, delta_text
from asyncvmm.timing.text import duration_text, printable

WIDEST = 16384
"""Cells of a line that are enough for any table."""

_STYLES = {"moved": "bold yellow", "within spread": "dim", "spread unknown": ""}


def draw_comparison(comparison: Comparison, console: Console) -> None:
    """Print ``comparison`` on ``console``."""
    for number, group in enumerate(comparison.groups, 1):
        console.print(Text(f"[{number}] {group_text(group)}"), soft_wrap=True)
    table = _table(comparison, comparison.spread)
    wide = console.options.update(max_width=WIDEST)
    if console.is_terminal and Measurement.get(console, wide, table).maximum > console.width:
        table = _table(comparison, ranges=False)
        if comparison.spread:
            console.print(Text("ranges are left out: the terminal is too narrow for them", style="dim"))
    console.print(table)
    for conclusion in comparison.conclusions:
        console.print(Text(conclusion, style="bold"), soft_wrap=True)


def _table(comparison: Comparison, ranges: bool) -> Table:
    several = len(comparison.groups) > 1
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for number in range(1, len(comparison.groups) + 1):
        table.add_column(f"[{number}]" if several else "median", justify="right", no_wrap=True)
        if ranges:
            table.add_column("min..max", justify="right", no_wrap=True)
        if number > 1:
            table.add_column("against [1]", justify="right")
    for line in comparison.lines:
        table.add_row(*_cells(line, ranges))
    return table


def group_text(group: Group) -> str:
    """``boot.jsonl: 20 boots, 1 failed or incomplete and left out``."""
    count = len(group.charts)
    left_out = f", {group.left_out} failed or incomplete and left out" if group.left_out else ""
    total = f", total {group.total_spans}" if group.total_spans else ""
    return f"{printable(group.name)}: {count} {group.what}{'s' * (count != 1)}{total}{left_out}"


def spread_text(spread: Spread) -> str:
    """``2390 ms..2431 ms, IQR 12.1 ms``; empty of one boot."""
    if spread.width is None:
        return ""
    quartiles = f", IQR {duration_text(spread.width)}" if spread.quartiles else ""
    return f"{duration_text(spread.least)}..{duration_text(spread.most)}{quartiles}"


def _cells(line: Line, ranges: bool) -> Iterator[Text]:
    yield Text("  " * line.depth + (f"guest {line.label}" if line.guest else line.label))
    for number, (spread, delta) in enumerate(zip(line.spreads, line.deltas, strict=True)):
        yield Text("" if spread is None else duration_text(spread.median))
        if ranges:
            yield Text("" if spread is None else spread_text(spread), style="dim")
        if number:
            yield _delta_cell(delta)


def _delta_cell(delta: Delta | None) -> Text:
    if delta is None:
        return Text("")
    verdict = "" if delta.verdict == "spread unknown" else f" {delta.verdict}"
    return Text(delta_text(delta) + verdict, style=_STYLES[delta.verdict])
