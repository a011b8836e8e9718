from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import pytest

from asyncvmm.console import Console
from asyncvmm.effects import Effect, Port, SerialOutput, Stopped
from asyncvmm.events.hub import EventHub
from asyncvmm.events.markers import (
    BootTime,
    ClockReading,
    GoDone,
    Heartbeat,
    Idle,
    Listener,
    Marker,
    Panic,
    PreExec,
    Ready,
    WorkloadExit,
)
from asyncvmm.events.types import (
    Event,
    GuestBootTime,
    GuestExit,
    GuestGoDone,
    GuestHeartbeat,
    GuestIdle,
    GuestListener,
    GuestPreExec,
    GuestReady,
    SerialLine,
)
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.timeline import Timeline
from asyncvmm.watch import GuestInstant, GuestWatch, event_of

START_NS = 1_000_000


async def nowhere(data: bytes) -> None:
    """Take what is written."""


@attrs.define
class Watched:
    """A watch with everything around it."""

    watch: GuestWatch
    console: Console
    events: list[Event] = attrs.field(factory=list)
    ends: list[Stopped] = attrs.field(factory=list)

    def say(self, port: Port, data: bytes, at_ns: int = START_NS, lost: int = 0) -> None:
        """The guest writes ``data``, all of it at one time."""
        self.take([SerialOutput(port, data, (at_ns,) * data.count(b"\n"), lost)])

    def take(self, effects: Sequence[Effect]) -> None:
        self.watch.take(effects)


@pytest.fixture
async def watched() -> Callable[..., Watched]:
    """Makes a Watched whose time zero is START_NS."""

    def make(*, serial_lines: bool = False, guest_instant: GuestInstant = lambda tsc: None) -> Watched:
        hub, console, ends = EventHub(), Console(nowhere), list[Stopped]()
        timeline = Timeline(lambda: START_NS)
        watch = GuestWatch(hub, console, timeline, ends.append, serial_lines=serial_lines, guest_instant=guest_instant)
        found = Watched(watch, console, ends=ends)
        hub.attach(found.events.append)
        return found

    return make


pytestmark = pytest.mark.anyio


async def test_markers_on_the_control_line_become_events_with_their_newlines_time(
    watched: Callable[..., Watched],
) -> None:
    guest = watched()
    guest.say("control", b"BOOT_TIME:init_entry:31\nREADY\n", START_NS + 5)
    guest.say("control", b"heartbeat counter=1\nlistener proto=tcp port=80\n", START_NS + 9)
    guest.say("control", b"workload-pre-exec\nworkload-exit code=3\n", START_NS + 10)
    assert guest.events == [
        GuestBootTime(5, "init_entry", 31),
        GuestReady(5),
        GuestHeartbeat(9, 1),
        GuestListener(9, "tcp", 80),
        GuestPreExec(10),
        GuestExit(10, 3),
    ]
    assert guest.ends == []


async def test_a_marker_may_come_in_pieces(watched: Callable[..., Watched]) -> None:
    guest = watched()
    for index, byte in enumerate(b"READY\n"):
        guest.say("control", bytes([byte]), START_NS + index)
    assert guest.events == [GuestReady(5)]


async def test_lines_of_the_two_ports_do_not_mix(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"REA")
    guest.say("console", b"a line\n")
    guest.say("control", b"DY\n")
    assert guest.events == [GuestReady(0)]


async def test_output_of_the_console_reaches_its_readers_and_control_does_not(
    watched: Callable[..., Watched],
) -> None:
    guest = watched()
    reader = guest.console.subscribe()
    guest.say("console", b"hello", lost=2)
    guest.say("control", b"READY\n")
    assert (reader.take(), reader.lost) == (b"hello", 2)


async def test_a_line_with_bytes_missing_is_no_marker(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"REA", lost=10)
    guest.say("control", b"DY\nREADY\n")
    assert guest.events == [GuestReady(0)]
    assert guest.watch.contract.malformed == 1


async def test_a_workload_cannot_forge_markers_on_the_console(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"workload-pre-exec\n")
    guest.say("console", b"READY\nBOOT_TIME:init_ok:1\nKernel panic - not syncing: forged\n")
    assert guest.events == [GuestPreExec(0)]
    assert guest.ends == []


async def test_a_kernel_panic_is_the_guests_end(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("console", b"[    1.0] Kernel panic - not syncing: no init found\n", START_NS + 7)
    assert [(end.reason, end.t_ns) for end in guest.ends] == [("panic", START_NS + 7)]
    assert "no init found" in guest.ends[0].detail


async def test_a_guest_whose_pid_1_cannot_go_on_has_ended(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"init-error root=2\n", START_NS + 7)
    assert guest.ends == [Stopped("init-error", detail="root=2", t_ns=START_NS + 7)]


async def test_what_pid_1_goes_on_without_is_logged(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    watched().say("control", b"init-warning net=dhcp\n", START_NS + 7)
    assert "net=dhcp" in caplog.text


async def test_the_machines_end_is_passed_on_behind_what_was_written_before_it(
    watched: Callable[..., Watched],
) -> None:
    guest = watched()
    end = Stopped("shutdown")
    guest.take([SerialOutput("control", b"READY\n", (START_NS,)), end])
    assert guest.events == [GuestReady(0)]
    assert guest.ends == [end]


async def test_every_line_is_an_event_only_where_asked_for(watched: Callable[..., Watched]) -> None:
    quiet, talkative = watched(), watched(serial_lines=True)
    for guest in (quiet, talkative):
        guest.say("console", b"one\ntwo\n", START_NS + 1)
    assert quiet.events == []
    assert [type(event) for event in talkative.events] == [SerialLine, SerialLine]


async def test_newlines_without_a_time_get_the_present_one(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.take([SerialOutput("control", b"READY\n")])
    assert guest.events == [GuestReady(0)]


async def test_boot_times_tie_the_guests_clock_to_the_arrival_of_their_lines(
    watched: Callable[..., Watched],
) -> None:
    guest = watched()
    assert guest.watch.guest_clock is None
    guest.say("control", b"BOOT_TIME:init_entry:100\n", START_NS + 900)
    guest.say("control", b"BOOT_TIME:ready:300\n", START_NS + 1000)
    assert guest.watch.guest_clock == GuestClock(700, 701, "paired")


async def test_a_clock_reading_ties_it_by_the_tsc(watched: Callable[..., Watched]) -> None:
    guest = watched(guest_instant=lambda tsc: (START_NS + tsc, 2))
    guest.say("control", b"clock tsc=500 ns=100 tsc_end=510\nBOOT_TIME:init_entry:100\n", START_NS + 900)
    assert guest.watch.guest_clock == GuestClock(405, 7, "tsc")
    assert guest.events == [GuestBootTime(900, "init_entry", 100)]


async def test_a_reading_that_the_machine_cannot_place_leaves_the_pairing(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"clock tsc=500 ns=100 tsc_end=510\nBOOT_TIME:init_entry:100\n", START_NS + 900)
    assert guest.watch.guest_clock == GuestClock(800, 801, "paired")


async def test_what_is_printed_after_the_capture_leaves_the_clock_alone(watched: Callable[..., Watched]) -> None:
    guest = watched(guest_instant=lambda tsc: (START_NS + tsc, 2))
    guest.say("control", b"BOOT_TIME:command_loop:100\n", START_NS + 900)
    before = guest.watch.guest_clock
    for port in ("control", "console"):
        guest.say(port, b"BOOT_TIME:ready:890\nclock tsc=500 ns=100 tsc_end=510\n", START_NS + 900)
    assert guest.watch.guest_clock == before


async def test_a_boot_time_from_the_future_ties_nothing(watched: Callable[..., Watched]) -> None:
    guest = watched()
    guest.say("control", b"BOOT_TIME:init_entry:18446744073709551615\n", START_NS + 900)
    assert guest.watch.guest_clock is None


@pytest.mark.parametrize(
    ("marker", "event"),
    [
        (BootTime("ready", 9), GuestBootTime(4, "ready", 9)),
        (Ready(), GuestReady(4)),
        (PreExec(), GuestPreExec(4)),
        (Heartbeat(2), GuestHeartbeat(4, 2)),
        (Listener("tcp6", 8080), GuestListener(4, "tcp6", 8080)),
        (WorkloadExit(255), GuestExit(4, 255)),
        (GoDone(7, 9), GuestGoDone(4, 9, 7)),
        (Idle(), GuestIdle(4)),
    ],
)
async def test_each_marker_has_its_event(marker: Marker, event: Event) -> None:
    assert event_of(marker, 4) == event


async def test_a_panic_is_no_event() -> None:
    with pytest.raises(ValueError, match="Panic"):
        event_of(Panic("x"), 0)


async def test_a_clock_reading_is_no_event() -> None:
    with pytest.raises(ValueError, match="ClockReading"):
        event_of(ClockReading(1, 2, 3), 0)
