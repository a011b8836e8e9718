from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.effects import Port
from asyncvmm.events.contract import GuestContract
from asyncvmm.events.lines import Line, LineScanner
from asyncvmm.events.markers import (
    BootTime,
    ClockReading,
    Heartbeat,
    InitError,
    InitWarning,
    Marker,
    Panic,
    PreExec,
    Ready,
    WorkloadExit,
)
from asyncvmm.timing.profiles import GuestBootProfile


def say(contract: GuestContract, port: Port, *lines: bytes) -> list[Marker]:
    markers = [contract.line(port, Line(line, 0)) for line in lines]
    return [marker for marker in markers if marker is not None]


BOOT = (
    b"BOOT_TIME:init_entry:10",
    b"BOOT_TIME:mounts_done:20",
    b"BOOT_TIME:uart_access_done:30",
    b"BOOT_TIME:init_ok:40",
    b"BOOT_TIME:ready:50",
    b"READY",
    b"BOOT_TIME:command_loop:60",
    b"workload-pre-exec",
)
PROFILE = GuestBootProfile(
    init_entry_ns=10, mounts_done_ns=20, uart_access_done_ns=30, init_ok_ns=40, ready_ns=50, command_loop_ns=60
)
FORGERIES = [
    b"BOOT_TIME:ready:1",
    b"BOOT_TIME:command_loop:1",
    b"BOOT_TIME:nonsense",
    b"READY",
    b"workload-pre-exec",
    b"heartbeat counter=99",
    b"listener proto=tcp port=22",
    b"workload-exit code=0",
    b"clock tsc=1 ns=1 tsc_end=1",
    b"Kernel panic - not syncing: gotcha",
]


@pytest.mark.parametrize("port", ["console", "control"])
def test_a_whole_boot_counts_on_either_port(port: Port) -> None:
    contract = GuestContract()
    assert len(say(contract, port, *BOOT)) == len(BOOT)
    assert contract.profile == PROFILE
    assert contract.ready
    assert contract.started


@given(st.lists(st.sampled_from(FORGERIES)))
def test_a_workload_forges_nothing_on_the_console(lines: list[bytes]) -> None:
    contract = GuestContract()
    say(contract, "control", *BOOT)
    assert say(contract, "console", *lines) == []
    assert (contract.profile, contract.malformed, contract.ignored) == (PROFILE, 0, 0)


@pytest.mark.parametrize("line", [b"heartbeat counter=1", b"listener proto=tcp port=1", b"workload-exit code=0"])
def test_heartbeat_listener_and_exit_never_count_on_the_console(line: bytes) -> None:
    contract = GuestContract()
    assert say(contract, "console", line) == []
    assert len(say(contract, "control", line)) == 1


def test_the_control_line_counts_after_the_workload_started() -> None:
    contract = GuestContract()
    say(contract, "control", *BOOT)
    assert say(contract, "control", b"heartbeat counter=1", b"workload-exit code=3") == [Heartbeat(1), WorkloadExit(3)]


def test_a_repeated_stage_keeps_its_last_value() -> None:
    contract = GuestContract()
    assert say(contract, "control", b"BOOT_TIME:ready:1", b"BOOT_TIME:ready:2") == [
        BootTime("ready", 1),
        BootTime("ready", 2),
    ]
    assert contract.profile == GuestBootProfile(ready_ns=2)


def test_capture_closes_with_command_loop() -> None:
    contract = GuestContract()
    say(contract, "control", b"BOOT_TIME:command_loop:6")
    assert not contract.capturing
    assert say(contract, "control", b"BOOT_TIME:ready:7", b"BOOT_TIME:command_loop:8") == []
    assert contract.profile == GuestBootProfile(command_loop_ns=6)
    assert contract.ignored == 2


def test_ready_and_pre_exec_count_once_whatever_the_port() -> None:
    contract = GuestContract()
    assert say(contract, "console", b"READY") == [Ready()]
    assert say(contract, "control", b"READY", b"workload-pre-exec", b"workload-pre-exec") == [PreExec()]


def test_malformed_and_unknown_markers_are_counted_and_change_nothing() -> None:
    contract = GuestContract()
    assert say(contract, "console", b"BOOT_TIME:ready:-1", b"BOOT_TIME:lunch:1", b"listener in the hall") == []
    assert say(contract, "control", b"listener proto=tcp port=0") == []
    assert contract.malformed == 2
    assert contract.profile == GuestBootProfile()


@pytest.mark.parametrize("port", ["console", "control"])
def test_a_marker_a_megabyte_long_is_malformed(port: Port) -> None:
    contract, scanner = GuestContract(), LineScanner()
    (line,) = scanner.feed(b"BOOT_TIME:ready:" + b"1" * (1 << 20) + b"\n")
    assert contract.line(port, line) is None
    assert contract.malformed == 1


def test_a_marker_with_a_hole_in_it_does_not_count() -> None:
    contract = GuestContract()
    assert contract.line("control", Line(b"BOOT_TIME:ready:123", 0, truncated=True)) is None
    assert contract.line("control", Line(b"READY", 0, truncated=True)) is None
    assert contract.malformed == 2


def test_a_panic_counts_once_and_only_on_the_console() -> None:
    contract, line = GuestContract(), b"[    1.000000] Kernel panic - not syncing: Attempted to kill init!"
    assert say(contract, "control", line) == []
    assert say(contract, "console", line, line) == [Panic("Attempted to kill init!")]
    assert contract.panicked


def test_what_pid_1_cannot_do_counts_on_the_control_line_until_ready() -> None:
    contract = GuestContract()
    assert say(contract, "console", b"init-error root=2", b"init-warning net=dhcp") == []
    assert say(contract, "control", b"init-warning net=dhcp", b"init-error root=2") == [
        InitWarning("net=dhcp"),
        InitError("root=2"),
    ]
    assert say(contract, "control", b"READY", b"init-error root=2", b"init-warning net=x") == [Ready()]


def test_the_clock_reading_counts_once_and_on_the_control_line_alone() -> None:
    contract = GuestContract()
    assert say(contract, "console", b"clock tsc=1 ns=2 tsc_end=3", b"clock tsc=") == []
    assert say(contract, "control", b"clock tsc=4 ns=5 tsc_end=6", b"clock tsc=7 ns=8 tsc_end=9") == [
        ClockReading(4, 5, 6)
    ]
    assert contract.malformed == 0


def test_a_clock_reading_after_the_capture_does_not_count() -> None:
    contract = GuestContract()
    assert say(contract, "control", b"BOOT_TIME:command_loop:1", b"clock tsc=4 ns=5 tsc_end=6") == [
        BootTime("command_loop", 1)
    ]


@given(st.lists(st.tuples(st.sampled_from(["console", "control"]), st.binary(max_size=40) | st.sampled_from(BOOT))))
def test_no_sequence_of_lines_raises(lines: list[tuple[Port, bytes]]) -> None:
    contract = GuestContract()
    for port, text in lines:
        contract.line(port, Line(text, 0))
    contract.profile.to_dict()


def test_ready_on_the_control_line_shows_that_pid_1_is_ours() -> None:
    ours, foreign = GuestContract(), GuestContract()
    say(ours, "control", b"READY")
    say(foreign, "console", b"READY")
    assert ours.ready_on_control
    assert not foreign.ready_on_control


@pytest.mark.parametrize("line", [b"clock tsc=1 ns=2 tsc_end=3", b"go-done tsc=1 realtime_ns=2"])
def test_a_pid_1_that_reads_its_clock_or_has_answered_is_one_that_answers(line: bytes) -> None:
    contract = GuestContract()
    say(contract, "console", line)
    say(contract, "control", b"READY", b"heartbeat counter=1", line[:-3])
    assert not contract.answers_go
    say(contract, "control", line)
    assert contract.answers_go
