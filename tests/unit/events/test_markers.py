from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncvmm.events.markers import (
    STAGES,
    U64_MAX,
    BootTime,
    ClockReading,
    GoDone,
    Heartbeat,
    Idle,
    InitError,
    InitWarning,
    Listener,
    Malformed,
    Panic,
    PreExec,
    Ready,
    UnknownStage,
    WorkloadExit,
    parse_marker,
    parse_panic,
)

PROTOS = ("tcp", "tcp6", "udp", "udp6")


@given(st.sampled_from(STAGES), st.integers(0, U64_MAX))
@example("ready", U64_MAX)
def test_every_stage_and_every_u64_is_understood(stage: str, guest_ns: int) -> None:
    assert parse_marker(f"BOOT_TIME:{stage}:{guest_ns}".encode()) == BootTime(stage, guest_ns)


@pytest.mark.parametrize(
    ("line", "marker"),
    [
        (b"READY", Ready()),
        (b"workload-pre-exec", PreExec()),
        (b"heartbeat counter=1", Heartbeat(1)),
        (b"listener proto=tcp port=8080", Listener("tcp", 8080)),
        (b"listener proto=tcp6 port=65535", Listener("tcp6", 65535)),
        (b"workload-exit code=0", WorkloadExit(0)),
        (b"workload-exit code=137", WorkloadExit(137)),
        (b"idle", Idle()),
        (b"go-done tsc=5 realtime_ns=18446744073709551615", GoDone(5, (1 << 64) - 1)),
        (b"BOOT_TIME:coffee_ready:7", UnknownStage()),
        (b"clock tsc=10 ns=5 tsc_end=12", ClockReading(10, 5, 12)),
        (b"init-error root=2", InitError("root=2")),
        (b"init-warning net=dhcp", InitWarning("net=dhcp")),
        (b"init-warning module=virtio_net.ko", InitWarning("module=virtio_net.ko")),
        (b"clock tsc=0 ns=18446744073709551615 tsc_end=18446744073709551615", ClockReading(0, U64_MAX, U64_MAX)),
    ],
)
def test_a_marker_is_understood(line: bytes, marker: object) -> None:
    assert parse_marker(line) == marker


@pytest.mark.parametrize(
    "line",
    [
        b"BOOT_TIME",
        b"BOOT_TIME:ready",
        b"BOOT_TIME:ready:",
        b"BOOT_TIME::1",
        b"BOOT_TIME:ready:1_000",
        b"BOOT_TIME:ready: 1",
        b"BOOT_TIME:ready:1 ",
        b"BOOT_TIME:ready:+1",
        b"BOOT_TIME:ready:-1",
        b"BOOT_TIME:ready:0x10",
        b"BOOT_TIME:ready:1.5",
        b"BOOT_TIME:ready:1:2",
        b"BOOT_TIME:ready:nan",
        "BOOT_TIME:ready:١٢".encode(),
        b"BOOT_TIME:ready:18446744073709551616",
        b"BOOT_TIME:ready:" + b"9" * 5000,
        b"BOOT_TIME:ready:12\0",
        b"BOOT_TIMEready12",
        b"heartbeat counter=",
        b"heartbeat counter=99999999999999999999",
        b"listener proto=tcp port=0",
        b"listener proto=tcp port=65536",
        b"listener proto=sctp port=1",
        b"clock ",
        b"init-error root",
        b"init-error root=2 ",
        b"init-error root=\xff",
        b"init-warning " + b"a" * 65 + b"=" + b"b" * 65,
        b"clock tsc=1 ns=2",
        b"clock ns=1 tsc=2 tsc_end=3",
        b"clock tsc=1 ns=2 tsc_end=3 ",
        b"clock tsc=-1 ns=2 tsc_end=3",
        b"clock tsc=1  ns=2 tsc_end=3",
        b"clock tsc=1 ns=18446744073709551616 tsc_end=3",
        b"clock tsc=5 ns=2 tsc_end=4",
        b"workload-exit code=256",
        b"workload-exit code=-1",
        b"go-done ",
        b"go-done tsc=5",
        b"go-done tsc=5 realtime_ns=18446744073709551616",
        b"go-done tsc=18446744073709551616 realtime_ns=1",
        b"go-done tsc=-1 realtime_ns=1",
        b"go-done tsc=1 realtime_ns=1 ",
    ],
)
def test_a_malformed_marker_is_said_to_be_one_with_a_short_excerpt(line: bytes) -> None:
    marker = parse_marker(line)
    assert isinstance(marker, Malformed)
    assert line.startswith(marker.excerpt)
    assert len(marker.excerpt) <= 128


@pytest.mark.parametrize("line", [b"", b"ready", b"READY ", b" READY", b"READY!", b"xBOOT_TIME:ready:1", b"Welcome"])
def test_other_lines_are_none(line: bytes) -> None:
    assert parse_marker(line) is None


@given(
    st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=30).map(lambda tail: b"BOOT_TIME:ready:" + tail),
        st.binary(max_size=30).map(lambda tail: b"heartbeat counter=" + tail),
        st.binary(max_size=30).map(lambda tail: b"listener proto=tcp port=" + tail),
        st.binary(max_size=30).map(lambda tail: b"clock tsc=1 ns=" + tail),
        st.binary(max_size=30).map(lambda tail: b"go-done tsc=1 realtime_ns=" + tail),
    )
)
def test_no_line_raises_and_a_number_comes_only_from_ascii_digits(line: bytes) -> None:
    marker = parse_marker(line)
    if isinstance(marker, BootTime):
        assert line.isascii()
        assert line.rsplit(b":")[-1].isdigit()
        assert marker.guest_ns <= U64_MAX


VALID = st.one_of(
    st.builds(lambda stage, ns: f"BOOT_TIME:{stage}:{ns}", st.sampled_from(STAGES), st.integers(0, U64_MAX)),
    st.builds(lambda counter: f"heartbeat counter={counter}", st.integers(0, U64_MAX)),
    st.builds(
        lambda proto, port: f"listener proto={proto} port={port}", st.sampled_from(PROTOS), st.integers(1, 65535)
    ),
    st.builds(lambda code: f"workload-exit code={code}", st.integers(0, 255)),
    st.builds(lambda tsc, ns: f"go-done tsc={tsc} realtime_ns={ns}", *[st.integers(0, U64_MAX)] * 2),
    st.builds(lambda tsc, ns: f"clock tsc={tsc} ns={ns} tsc_end={U64_MAX}", *[st.integers(0, U64_MAX)] * 2),
    st.sampled_from(["READY", "workload-pre-exec", "idle"]),
).map(str.encode)


def spelling(marker: object) -> bytes:
    """The one way to write ``marker``."""
    match marker:
        case BootTime(stage, ns):
            return f"BOOT_TIME:{stage}:{ns}".encode()
        case Heartbeat(counter):
            return f"heartbeat counter={counter}".encode()
        case Listener(proto, port):
            return f"listener proto={proto} port={port}".encode()
        case WorkloadExit(code):
            return f"workload-exit code={code}".encode()
        case GoDone(tsc, realtime_ns):
            return f"go-done tsc={tsc} realtime_ns={realtime_ns}".encode()
        case ClockReading(tsc, ns, tsc_end):
            return f"clock tsc={tsc} ns={ns} tsc_end={tsc_end}".encode()
        case Ready():
            return b"READY"
        case PreExec():
            return b"workload-pre-exec"
        case Idle():
            return b"idle"
    raise AssertionError(marker)


@given(VALID)
def test_a_marker_is_read_as_it_was_written(line: bytes) -> None:
    assert spelling(parse_marker(line)) == line


@given(VALID, st.integers(0, 100), st.integers(0, 2), st.binary(max_size=2))
def test_a_marker_with_a_scratch_is_another_marker_or_none(line: bytes, at: int, gone: int, put: bytes) -> None:
    at %= len(line) + 1
    scratched = line[:at] + put + line[at + gone :]
    marker = parse_marker(scratched)
    if marker is not None and not isinstance(marker, Malformed | UnknownStage):
        plain = re.sub(rb"(?<=[:=])0+(?=[0-9])", b"", scratched)
        assert spelling(marker) == plain


@pytest.mark.parametrize(
    "line",
    [
        b"Kernel panic - not syncing: VFS: no root",
        b"[    0.123456] Kernel panic - not syncing: VFS: no root",
        b"[    0.123456][    T1] Kernel panic - not syncing: VFS: no root",
    ],
)
def test_a_panic_is_seen_with_and_without_printk_time(line: bytes) -> None:
    assert parse_panic(line) == Panic("VFS: no root")


@pytest.mark.parametrize("line", [b"---[ end Kernel panic - not syncing: VFS ]---", b"echo Kernel panic", b""])
def test_other_mentions_are_not_a_panic(line: bytes) -> None:
    assert parse_panic(line) is None
