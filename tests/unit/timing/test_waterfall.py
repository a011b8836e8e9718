"""The waterfall in a terminal and in a pipe: everything is there, nothing of a file drives the terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncvmm.timing.chart import Chart, lay_out
from asyncvmm.timing.reading import read_recordings
from asyncvmm.timing.waterfall import ASCII, BAR_WIDTH, PLAIN_WIDTH, draw
from tests.support.recordings import MS, boot, line, phase, restore


def chart(lines: list[bytes]) -> Chart:
    (recording,) = read_recordings(lines, "boot.jsonl").recordings
    return lay_out(recording)


def drawn(lines: list[bytes], width: int = PLAIN_WIDTH, terminal: bool = False) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False)
    draw(chart(lines), console)
    return [text.rstrip() for text in out.getvalue().splitlines()]


def row(lines: list[str], label: str) -> str:
    (found,) = (text for text in lines if text.strip().split("  ")[0] == label)
    return found


def test_a_pipe_gets_each_row_with_start_duration_share_and_bar() -> None:
    lines = drawn(boot())
    assert lines[0] == "VM a1b2  boot.jsonl: total 99.0 ms on qemu, READY at 96.0 ms"
    assert row(lines, "total").split() == ["total", "1.00", "ms", "99.0", "ms", "100.0%", "━" * BAR_WIDTH]
    assert row(lines, "qemu_fork").split()[1:7] == ["15.0", "ms", "400", "us", "0.4%", "╸"]
    assert row(lines, "boot_wait").split()[1:6] == ["16.0", "ms", "80.0", "ms", "80.8%"]
    assert row(lines, "residual of boot").split()[3:] == ["15.4", "ms", "1.60", "ms", "1.6%", "┄┄", "┄"]
    assert row(lines, "init_entry").split()[1:6] == ["20.0", "ms", "60.0", "ms", "60.6%"]
    assert row(lines, "READY").split() == ["READY", "96.0", "ms", "◆"]
    assert lines[-1] == "note: guest clock tied to the host's (paired), off by at most 500 us"


def test_a_restore_is_drawn_with_its_stages_and_no_ready_is_missed() -> None:
    lines = drawn(restore())
    assert "restored on kvm, total 40.0 ms from call to first guest event, mapped after 11.0 ms" in lines[0]
    assert not [text for text in lines if text.split()[:1] == ["total"]]
    assert "READY" not in "".join(lines)
    at = lines.index("restore, up to each stage")
    assert [text.split()[0] for text in lines[at + 1 : at + 4]] == [
        "restore.mapped",
        "restore.first_exit",
        "restore.first_guest_event",
    ]
    assert row(lines, "restore.first_exit").split()[1:6] == ["10.0", "ms", "5.00", "ms", "12.5%"]


def test_host_and_guest_share_one_axis() -> None:
    lines = drawn(boot())
    column = row(lines, "total").index("━")
    at_20_ms = column + 19 * BAR_WIDTH // 99
    assert row(lines, "init_entry").index("━") == at_20_ms
    assert row(lines, "boot_wait").index("━") == column + 15 * BAR_WIDTH // 99


def test_a_pipe_gets_no_escape_codes_and_labels_whole() -> None:
    label = "a_phase_with_a_name_that_is_long_" * 7
    lines = drawn([phase(label, 0, MS)])
    assert label in lines[2]
    assert "guest, up to each stage" in drawn([line("guest.boot_time", 5, stage="a", guest_ns=1)])
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("width", [32, 40, 60, 80, 100, 200])
def test_a_terminal_is_filled_and_not_overrun(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, no_color=True, highlight=False, color_system=None)
    draw(chart(boot()), console)
    table = [text for text in out.getvalue().splitlines() if " ms" in text and not text.startswith(("VM", "note"))]
    assert len(table) >= 14
    assert all(len(text) <= width for text in table)
    if width >= 80:
        assert max(len(text.rstrip()) for text in table) == width


def test_a_terminal_gets_colours_and_dim_residuals() -> None:
    text = "\n".join(drawn(boot(), 120, terminal=True))
    assert "\x1b[34m" in text
    assert "\x1b[2mresidual" in text.replace("  ", "")


def test_what_could_drive_a_terminal_is_escaped_and_markup_is_only_text() -> None:
    name = "\x1b]0;owned\x07[bold red]x[/]\u202e:smile:"
    lines = drawn([phase(name, 0, MS), line("vm.error", MS, what="a\nb\x9b2J")])
    text = "\n".join(lines)
    assert "\\x1b]0;owned\\x07[bold red]x[/]\\u202e:smile:" in text
    assert "error: a\\x0ab\\x9b2J" in text
    assert all(char.isprintable() or char == "\n" for char in text)


def test_a_phase_of_nanoseconds_in_a_boot_of_minutes_stays_readable() -> None:
    lines = drawn([phase("long", 0, 600_000 * MS), phase("tiny", 5, 12)])
    assert row(lines, "tiny").split() == ["tiny", "5", "ns", "12", "ns", "0.0%", "╸"]


def test_what_came_after_the_boot_is_at_the_edge() -> None:
    lines = drawn([*boot(), line("guest.exit", 60_000 * MS, code=0)])
    assert row(lines, "workload exits with 0").index("▸") == row(lines, "total").rindex("━")


def test_an_absurd_stage_is_named_with_its_value_and_takes_no_room() -> None:
    absurd = [*boot(), line("guest.boot_time", 90 * MS, stage="liar", guest_ns=(1 << 64) - 1)]
    lines = drawn(absurd)
    assert row(lines, "liar").split() == ["liar", "▸", "off", "the", "axis:", "18446744073709", "ms"]
    assert row(lines, "total") == row(drawn(boot()), "total")
    assert "%" not in row(lines, "liar")
    assert [text for text in drawn(absurd, 60, terminal=True) if "off the axis, liar says 18446744073709 ms" in text]


def test_failed_phases_and_errors_say_so() -> None:
    text = "\n".join(drawn([phase("boot", 0, MS, failed=True), line("vm.error", MS, what="no")]))
    assert "boot (failed)" in text
    assert "error: no" in text


def test_a_vm_without_anything_to_draw_is_named() -> None:
    assert drawn([line("guest.heartbeat", 1, counter=1)])[1] == "no phases and no guest stages"


def test_an_output_without_unicode_gets_plain_bars() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, "ascii"), width=PLAIN_WIDTH)
    draw(chart(boot()), console)
    console.file.flush()
    assert ASCII.bar * BAR_WIDTH in raw.getvalue().decode("ascii")


labels = st.text(max_size=12)


@given(st.lists(st.tuples(labels, st.integers(0, 99), st.integers(0, 99), labels), max_size=8), st.integers(1, 150))
def test_any_phases_are_drawn_at_any_width(some: list[tuple[str, int, int, str]], width: int) -> None:
    lines = [phase(name, start, took, parent) for name, start, took, parent in some] + [line("guest.ready", 5)]
    drawn(lines, width, terminal=True)
    drawn(lines)
