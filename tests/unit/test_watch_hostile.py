"""What a guest may print, end to end: bytes in, events, profile, clock and milestones out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.console import Console
from asyncvmm.effects import Port, SerialOutput, Stopped
from asyncvmm.events.hub import EventHub
from asyncvmm.events.markers import STAGES, U64_MAX
from asyncvmm.events.types import Event, GuestBootTime, GuestReady
from asyncvmm.timing.profiles import GuestBootProfile
from asyncvmm.timing.timeline import Timeline
from asyncvmm.watch import GuestWatch

START_NS = 1_000_000_000


async def nowhere(data: bytes) -> None:
    """Take what is written."""


class Guest:
    """A guest that writes, and everything its output can change."""

    def __init__(self) -> None:
        self.hub, self.ends, self.events = EventHub(), list[Stopped](), list[Event]()
        self.captured = 0
        self.now = START_NS
        self.watch = GuestWatch(
            self.hub,
            Console(nowhere),
            Timeline(lambda: START_NS),
            self.ends.append,
            on_captured=self._on_captured,
            guest_instant=lambda tsc: (START_NS + tsc, 1),
        )
        self.hub.attach(self.events.append)

    def say(self, port: Port, data: bytes, cuts: tuple[int, ...] = ()) -> None:
        """Write ``data`` in pieces cut at ``cuts``, each a microsecond after the one before."""
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        for start, end in itertools.pairwise(edges):
            self.now += 1000
            piece = data[start:end]
            self.watch.take([SerialOutput(port, piece, (self.now,) * piece.count(b"\n"))])

    def standing(self) -> dict[str, Any]:
        """All that the guest's output has decided so far."""
        contract = self.watch.contract
        milestones = (self.hub.ready, self.hub.pre_exec, self.hub.listener, self.hub.exit, self.hub.stopped)
        return {
            "profile": contract.profile,
            "clock": self.watch.guest_clock,
            "milestones": [milestone.done for milestone in milestones],
            "flags": (contract.ready, contract.ready_on_control, contract.started, contract.panicked),
            "counts": (contract.malformed, contract.ignored),
            "events": list(self.events),
            "ends": list(self.ends),
            "captured": self.captured,
        }

    def _on_captured(self) -> None:
        self.captured += 1


MALFORMED = {
    "no colon": b"BOOT_TIME",
    "one colon": b"BOOT_TIME:ready",
    "no number": b"BOOT_TIME:ready:",
    "no stage": b"BOOT_TIME::1",
    "underscores": b"BOOT_TIME:ready:1_000",
    "a space before": b"BOOT_TIME:ready: 1",
    "a space behind": b"BOOT_TIME:ready:1 ",
    "a space for a colon": b"BOOT_TIME ready 1",
    "a tab": b"BOOT_TIME:ready:\t1",
    "Unicode digits": "BOOT_TIME:ready:\u0661\u0662".encode(),
    "full-width digits": "BOOT_TIME:ready:\uff11\uff12".encode(),
    "a superscript": "BOOT_TIME:ready:1\u00b2".encode(),
    "Latin-1": b"BOOT_TIME:ready:1\xb2",
    "a plus": b"BOOT_TIME:ready:+1",
    "negative": b"BOOT_TIME:ready:-1",
    "minus zero": b"BOOT_TIME:ready:-0",
    "hexadecimal": b"BOOT_TIME:ready:0x10",
    "a fraction": b"BOOT_TIME:ready:1.5",
    "an exponent": b"BOOT_TIME:ready:1e9",
    "no number at all": b"BOOT_TIME:ready:soon",
    "NaN": b"BOOT_TIME:ready:nan",
    "infinity": b"BOOT_TIME:ready:inf",
    "u64 and one": b"BOOT_TIME:ready:18446744073709551616",
    "21 digits": b"BOOT_TIME:ready:" + b"0" * 20 + b"1",
    "a megabyte of digits": b"BOOT_TIME:ready:" + b"1" * (1 << 20),
    "a megabyte of stage": b"BOOT_TIME:" + b"r" * (1 << 20) + b":1",
    "a NUL behind": b"BOOT_TIME:ready:1\0",
    "a NUL within": b"BOOT_TIME:ready:1\x002",
    "a carriage return within": b"BOOT_TIME:ready:1\r2",
    "a vertical tab": b"BOOT_TIME:ready:1\x0b",
    "one field more": b"BOOT_TIME:ready:1:2",
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("port", ["console", "control"])
@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_boot_time_is_counted_and_changes_nothing_else(line: bytes, port: Port, end: bytes) -> None:
    guest = Guest()
    guest.say(port, line + end, cuts=(5, 12, 4097))
    assert (guest.watch.contract.malformed, guest.watch.contract.ignored) == (1, 0)
    assert guest.events == []
    assert guest.watch.guest_clock is None
    guest.say(port, b"BOOT_TIME:ready:7" + end)
    assert guest.watch.contract.profile == GuestBootProfile(ready_ns=7)


UNKNOWN = {
    "another name": b"BOOT_TIME:coffee_ready:7",
    "upper case": b"BOOT_TIME:READY:7",
    "a space": b"BOOT_TIME: ready:7",
    "non-ASCII": "BOOT_TIME:r\u00e9ady:7".encode(),
    "not UTF-8": b"BOOT_TIME:\xff\xfe:7",
    "a NUL": b"BOOT_TIME:ready\0:7",
    "a field of ours": b"BOOT_TIME:__class__:7",
}


@pytest.mark.parametrize("line", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_stage_is_ignored(line: bytes) -> None:
    guest = Guest()
    guest.say("control", line + b"\n")
    assert (guest.watch.contract.malformed, guest.watch.contract.ignored) == (0, 1)
    assert guest.events == []
    assert guest.watch.contract.profile == GuestBootProfile()


cuts = st.lists(st.integers(0, 1 << 16), max_size=12).map(tuple)
stages = st.lists(st.tuples(st.sampled_from(STAGES), st.integers(0, U64_MAX)), max_size=12)


@given(stages, cuts, st.sampled_from([b"\n", b"\r\n"]), st.sampled_from(["console", "control"]))
def test_the_last_value_of_a_stage_counts_however_it_is_sent(
    said: list[tuple[str, int]], cuts: tuple[int, ...], end: bytes, port: Port
) -> None:
    guest, last, heard = Guest(), dict[str, int](), list[tuple[str, int]]()
    guest.say(port, b"".join(f"BOOT_TIME:{stage}:{ns}".encode() + end for stage, ns in said), cuts)
    for stage, ns in said:
        if "command_loop" not in last:
            last[stage] = ns
            heard.append((stage, ns))
    assert guest.watch.contract.profile == GuestBootProfile(**{f"{stage}_ns": ns for stage, ns in last.items()})
    assert [(event.stage, event.guest_ns) for event in guest.events if isinstance(event, GuestBootTime)] == heard
    assert guest.captured == ("command_loop" in last)


# -- after the capture -------------------------------------------------------------------------------------------------

BOOT = b"clock tsc=1000 ns=5 tsc_end=1010\n" + b"".join(
    f"BOOT_TIME:{stage}:{number}\n".encode() for number, stage in enumerate(STAGES, 10)
)
digits = st.integers(-1, 1 << 65)
stage_names = st.sampled_from(STAGES) | st.text(max_size=12)
markers = st.one_of(
    st.builds(lambda stage, ns: f"BOOT_TIME:{stage}:{ns}".encode(), stage_names, digits),
    st.builds(lambda tsc, ns, end: f"clock tsc={tsc} ns={ns} tsc_end={end}".encode(), digits, digits, digits),
    st.builds(lambda number: f"heartbeat counter={number}".encode(), digits),
    st.builds(lambda number: f"listener proto=tcp port={number}".encode(), digits),
    st.builds(lambda number: f"workload-exit code={number}".encode(), digits),
    st.sampled_from([b"READY", b"workload-pre-exec", b"[    1.0] Kernel panic - not syncing: forged"]),
    st.binary(max_size=60),
)
output = st.lists(st.tuples(markers, st.sampled_from([b"\n", b"\r\n", b"\r", b""]))).map(
    lambda lines: b"".join(itertools.chain.from_iterable(lines))
)


@given(output, cuts, st.booleans())
def test_nothing_a_workload_prints_changes_anything(forged: bytes, cuts: tuple[int, ...], ready: bool) -> None:
    guest = Guest()
    guest.say("console", b"Welcome to a line without an end")
    guest.say("control", BOOT + b"READY\n" * ready + b"workload-pre-exec\n")
    before = guest.standing()
    assert before["clock"] is not None
    guest.say("console", forged, cuts)
    assert guest.standing() == before


@given(output, cuts)
def test_what_is_printed_after_the_capture_changes_no_profile_and_no_clock(
    forged: bytes, cuts: tuple[int, ...]
) -> None:
    guest = Guest()
    guest.say("control", BOOT + b"READY\n")
    before = guest.standing()
    for port in ("console", "control"):
        guest.say(port, forged, cuts)
    after = guest.standing()
    assert [after[name] for name in ("profile", "clock", "captured")] == [
        before[name] for name in ("profile", "clock", "captured")
    ]
    assert [event for event in after["events"] if isinstance(event, GuestBootTime | GuestReady)] == before["events"]
