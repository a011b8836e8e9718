"""``asyncvmm timeline``: reads files of JSON lines, draws them on stdout, writes the page and the trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import attrs
from rich.console import Console

from asyncvmm.errors import ConfigError
from asyncvmm.timing.chart import Chart, lay_out
from asyncvmm.timing.compare import Comparison, compare, group
from asyncvmm.timing.compare_table import draw_comparison
from asyncvmm.timing.reading import Reading, capped_lines, read_recordings
from asyncvmm.timing.text import printable
from asyncvmm.timing.waterfall import PLAIN_WIDTH, draw
from asyncvmm.whole_file import STDOUT, write_whole

MAX_DRAWN = 8
"""VMs that are drawn one by one in a terminal; of more there is the table."""

_STDIN_NAME = "stdin"


def timeline(files: Sequence[Path], vms: Sequence[str], html: Path | None, perfetto: Path | None) -> None:
    """Draw the boots that ``files`` record, those of ``vms`` only if there are any, and write what was asked for.

    Lines that are not understood are named on stderr. Nothing is drawn if stdout is one of the outputs. Raises
    ConfigError for a file that cannot be read, if there is no event in any, for a VM that is not there and for outputs
    that would overwrite one another or a file; HostError for an output that cannot be written.
    """
    _refuse_clashes(files, [out for out in (html, perfetto) if out is not None])
    readings = [one for reading in _read_all(files, vms) if (one := _picked(reading, vms)).recordings]
    charts = [[lay_out(recording) for recording in reading.recordings] for reading in readings]
    every = [chart for some in charts for chart in some]
    comparison = compare([group(one.source, some) for one, some in zip(readings, charts, strict=True)])
    if html is not None:
        from asyncvmm.timing.page import page

        write_whole(html, page(every, comparison).encode())
    if perfetto is not None:
        from asyncvmm.timing.perfetto import trace_json

        write_whole(perfetto, trace_json(every))
    if STDOUT not in (str(html), str(perfetto)):
        _show(every, comparison)


def _refuse_clashes(files: Sequence[Path], outputs: Sequence[Path]) -> None:
    if [str(file) for file in files].count(STDOUT) > 1:
        raise ConfigError("timeline", expected="stdin once", found="more than one -")
    if len(outputs) == 2 and _same(*outputs):
        raise ConfigError(
            "timeline", expected="an output each for --html and --perfetto", found=f"{outputs[0]} for both"
        )
    for out in outputs:
        if str(out) != STDOUT and any(_same(out, file) for file in files if str(file) != STDOUT):
            raise ConfigError("timeline", expected="an output that is none of the files read", found=out)


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or (one.is_file() and one.samefile(other))
    except (OSError, ValueError):
        return False


def _read_all(files: Sequence[Path], vms: Sequence[str]) -> list[Reading]:
    readings = [_read(file) for file in files]
    found = [reading for reading in readings if reading.recordings]
    if not found:
        names = ", ".join(printable(str(file)) for file in files[:5])
        raise ConfigError("timeline", expected="events of asyncvmm, one a line", found=f"none in {names}")
    for reading in readings:
        _complain(reading)
    vms_there = {recording.vm for reading in found for recording in reading.recordings}
    for vm in vms:
        if vm not in vms_there:
            there = ", ".join(printable(name, 40) for name in sorted(vms_there)[:10])
            raise ConfigError("timeline", expected=f"a VM named {printable(vm)}", found=there)
    return found


def _picked(reading: Reading, vms: Sequence[str]) -> Reading:
    if not vms:
        return reading
    return attrs.evolve(reading, recordings=tuple(one for one in reading.recordings if one.vm in vms))


def _read(file: Path) -> Reading:
    name = _STDIN_NAME if str(file) == STDOUT else str(file)
    try:
        with _opened(file) as lines:
            return read_recordings(capped_lines(lines.readline), name)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("timeline", expected="a readable file", found=f"{printable(name)} ({reason})") from None


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if str(file) == STDOUT:
        yield sys.stdin.buffer
    else:
        with file.open("rb") as lines:
            yield lines


def _complain(reading: Reading) -> None:
    remarks = reading.remarks if reading.recordings else (*reading.remarks, "no event of asyncvmm")
    for remark in remarks:
        print(f"{printable(reading.source)}: {remark}", file=sys.stderr)


def _show(charts: Sequence[Chart], comparison: Comparison) -> None:
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    with console.capture() as drawn:
        _draw_all(charts, comparison, console)
    text = drawn.get()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(console.encoding, "backslashreplace"))
    sys.stdout.buffer.flush()


def _draw_all(charts: Sequence[Chart], comparison: Comparison, console: Console) -> None:
    for chart in charts[:MAX_DRAWN]:
        draw(chart, console)
        console.print()
    if (more := len(charts) - MAX_DRAWN) > 0:
        console.print(f"{more} more VM{'s' * (more > 1)} not drawn; --vm NAME draws one\n")
    if len(charts) > 1:
        draw_comparison(comparison, console)
