"""Progress on a real pseudo-terminal, from events that are made up: what is shown, how often, and how it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.errors import BootError
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import (
    AccelProbe,
    Event,
    GuestBootTime,
    GuestPreExec,
    GuestReady,
    PhaseEnded,
    SerialLine,
    VmError,
    VmState,
    VmTimingEvent,
)
from asyncvmm.progress import PERIOD_S, Progress, Story
from asyncvmm.terminal import StatusLine, status_line
from tests.support.screen import Terminal

MS = 1_000_000
TIMING = VmTimingEvent(2500 * MS, setup_ms=40, boot_ms=2413, guest_wait_ms=2379, total_ms=2453)
STORY: list[tuple[Event, str]] = [
    (VmState(1, "starting", "new"), "accel"),
    (PhaseEnded(73 * MS, "accel", 0, 73 * MS, "total"), "accel"),
    (AccelProbe(74 * MS, "qemu"), "setup"),
    (PhaseEnded(114 * MS, "setup", 74 * MS, 40 * MS, "total"), "boot"),
    (PhaseEnded(115 * MS, "qemu_fork", 114 * MS, 619_000, "boot"), "boot"),
    (VmState(116 * MS, "booting", "starting"), "boot_wait"),
    (GuestBootTime(2400 * MS, "init_entry", 1358 * MS), "guest init_entry"),
    (GuestBootTime(2401 * MS, "ready", 2**64 - 1), "guest ready"),
    (GuestReady(2402 * MS), "ready"),
    (VmState(2403 * MS, "ready", "booting"), "ready"),
    (TIMING, "ready"),
]
FOREIGN = "\x1b[2J\x1b]0;title\x07\x9b31m\r\nboo\u202e\x00\ud800"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal(120) as terminal:
        yield terminal


def line_of(terminal: Terminal) -> StatusLine:
    with os.fdopen(os.dup(terminal.slave), "w", encoding="utf-8") as stream:
        line = status_line(stream)
    assert line is not None
    return line


# -- the story ---------------------------------------------------------------------------------------------------------


def test_each_event_leads_to_the_step_that_follows_it() -> None:
    story = Story.begun(0.0)
    for at, (event, step) in enumerate(STORY):
        story.take(event, float(at))
        assert story.step == step, event


def test_a_step_lasts_from_the_event_that_began_it() -> None:
    story = Story.begun(10.0)
    story.take(VmState(0, "booting"), 12.0)
    story.take(PhaseEnded(0, "qemu_fork", 0, 619_000), 12.5)
    assert story.text(13.5).plain == "3.5 s boot_wait 1.5 s | qemu_fork 619us"


def test_what_was_done_last_comes_first_and_not_all_is_kept() -> None:
    story = Story.begun(0.0)
    for number in range(100):
        story.take(PhaseEnded(0, f"p{number}", 0, 5 * MS), 0.0)
    assert story.text(0.0).plain.endswith("| " + ", ".join(f"p{number} 5ms" for number in range(99, 91, -1)))


def test_a_boot_that_is_tried_again_is_seen_to_be() -> None:
    story = Story.begun(0.0)
    steps = []
    for name, failed in (("setup", False), ("boot_wait", True), ("boot", True), ("retry_pause", False)):
        story.take(PhaseEnded(0, name, 0, MS, failed=failed), 0.0)
        steps.append(story.step)
    assert steps == ["boot", "boot", "retry_pause", "setup"]
    assert "boot 1ms (failed)" in story.text(0.0).plain


def test_only_the_consoles_lines_are_shown_and_blank_ones_are_not() -> None:
    story = Story.begun(0.0)
    for port, text in (("console", "Linux version 6.1"), ("control", "READY"), ("console", "  ")):
        story.take(SerialLine(0, port, text), 0.0)  # type: ignore[arg-type]
    assert story.text(0.0).plain == "0.0 s accel 0.0 s | Linux version 6.1"


# -- on a terminal -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_boot_leaves_one_line_of_summary(terminal: Terminal) -> None:
    hub = EventHub()
    with Progress(hub, line_of(terminal)):
        for event, _ in STORY:
            await anyio.sleep(2 * PERIOD_S)
            hub.publish(event)
        assert not hub.listening
    screen = await anyio.to_thread.run_sync(terminal.screen)
    assert screen.lines == ["ready in 2453 ms on qemu: setup 40 ms, boot 2413 ms, guest_wait 2379 ms", ""]
    for step in ("accel", "setup", "boot_wait", "guest init_entry"):
        assert any(f" s {step} " in frame for frame in screen.frames)


@pytest.mark.anyio
async def test_however_much_happens_it_is_drawn_ten_times_a_second_at_most(terminal: Terminal) -> None:
    hub = EventHub()
    begin = time.monotonic()
    with Progress(hub, line_of(terminal)):
        while time.monotonic() < begin + 0.55:
            for number in range(100):
                hub.publish(SerialLine(0, "console", f"line {number} {FOREIGN}"))
            await anyio.lowlevel.checkpoint()
        most = (time.monotonic() - begin) / PERIOD_S + 1
    screen = await anyio.to_thread.run_sync(terminal.screen)
    assert 2 <= len(screen.frames) - 1 <= most
    assert screen.lines == [""]


@pytest.mark.anyio
async def test_progress_goes_on_until_all_that_it_waits_for_has_come(terminal: Terminal) -> None:
    hub = EventHub()
    with Progress(hub, line_of(terminal), (VmTimingEvent, GuestPreExec)):
        hub.publish(TIMING)
        assert hub.listening
        hub.publish(GuestPreExec(1))
        assert not hub.listening


@pytest.mark.anyio
async def test_an_error_of_the_vm_ends_it_with_an_empty_line(terminal: Terminal) -> None:
    hub = EventHub()
    with Progress(hub, line_of(terminal)):
        hub.publish(VmError.of(1, BootError("boot", expected="READY", found="panic", reason="panic")))
        assert not hub.listening
        await anyio.sleep(2 * PERIOD_S)
    screen = await anyio.to_thread.run_sync(terminal.screen)
    assert screen.lines == [""]
    assert len(screen.frames) == 2


@pytest.mark.anyio
@pytest.mark.parametrize("end", ["exception", "cancellation"])
async def test_whatever_ends_the_block_leaves_the_line_empty_and_the_terminal_as_it_was(
    terminal: Terminal, end: str
) -> None:
    hub, before = EventHub(), terminal.settings()
    with anyio.CancelScope() as scope:
        try:
            with Progress(hub, line_of(terminal)):
                await anyio.sleep(0.15)
                if end == "exception":
                    raise KeyError
                scope.cancel()
                await anyio.sleep(60)
        except KeyError:
            pass
    with anyio.CancelScope(shield=True):
        screen = await anyio.to_thread.run_sync(terminal.screen)
    assert screen.lines == [""]
    assert screen.frames[0].startswith("0.0 s accel")
    assert terminal.settings() == before
    assert not hub.listening


@pytest.mark.anyio
async def test_without_a_terminal_nobody_listens() -> None:
    hub = EventHub()
    with Progress(hub, None):
        assert not hub.listening


@pytest.mark.anyio
async def test_a_terminal_that_is_not_read_holds_up_nothing() -> None:
    with Terminal(reading=False) as terminal:
        hub = EventHub()
        with Progress(hub, line_of(terminal)):
            terminal.fill()
            await anyio.sleep(3 * PERIOD_S)
            hub.publish(TIMING)
