"""PID 1 in a real Linux on QEMU/TCG: what it says on the control line, and what a workload cannot do to it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest

from asyncvmm.guest import cpio
from asyncvmm.guest.archive import workload_archive
from asyncvmm.guest.image import find_image
from asyncvmm.machine.host_clock import clock_sample
from tests.support.hand_started import Guest, start_guest
from tests.support.probes import probe_programs
from tests.support.requirements import require

REALTIME_S = 1_234_567_890
LATER_S = 2_000_000_000
SECOND_NS = 10**9

END = "caf\u00e9\tend\n".encode()
EPERM, KILLED_BY_SIGSEGV = 1, 139

HOSTILE = r"""
echo begin; id -u; date +%s
for probe in ioperm outb attach serial; do /probe/$probe; echo $probe=$?; done
printf '#!/bin/sh\n/probe/ioperm\necho helper=$? > /tmp/said\nmv /tmp/said /tmp/helper\n' > /tmp/h; chmod 755 /tmp/h
echo '|/tmp/h' > /proc/sys/kernel/core_pattern; /probe/outb
for i in 1 2 3 4 5 6 7 8 9 10; do [ -f /tmp/helper ] || sleep 0.1; done; cat /tmp/helper
echo READY; echo BOOT_TIME:init_entry:1; echo workload-exit code=0
nc -l -p 8080 & sleep 0.3; kill $!
dd if=/dev/zero bs=1k count=20 2>/dev/null | tr '\0' x
printf 'caf\303\251\tend\n'
exit 7
"""


Boot = Callable[[bytes], Guest]


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    require("qemu")
    require("image")
    image = find_image()
    guests: list[Guest] = []

    def start(appended: bytes) -> Guest:
        guests.append(start_guest(image, appended, tmp_path_factory.mktemp("guest")))
        return guests[-1]

    yield start
    for guest in guests:
        guest.end()


@pytest.fixture(scope="session")
def held(boot: Boot) -> Guest:
    """An armed workload that stands in the pre-exec window for two heartbeats, gets rubbish, then its go."""
    probes = cpio.write(cpio.file(f"probe/{name}", code, 0o755) for name, code in probe_programs().items())
    guest = boot(probes + workload_archive(["sh", "-c", HOSTILE], arm_pre_exec=True))
    guest.wait_for("workload-pre-exec")
    guest.send(b"rubbish\n" + b"x" * 2000 + b"\ngo\ngo zz 1\ngo 00 \ngo 00 99999999999999999999999\n")
    guest.wait_for("heartbeat counter=2")
    guest.console_before_go = bytes(guest.console)
    guest.send(b"go " + b"a5" * 32 + f" {REALTIME_S}000000000\n".encode())
    guest.wait_for("workload-exit .*")
    guest.wait_for_console(END)
    guest.wait_for("idle")
    return guest


def _answers(guest: Guest) -> list[tuple[int, int]]:
    """What each go-done said: the time stamp counter, and CLOCK_REALTIME then."""
    found = [re.fullmatch(r"go-done tsc=(\d+) realtime_ns=(\d+)", line) for line in guest.lines]
    return [(int(match[1]), int(match[2])) for match in found if match]


def _console_after_go(guest: Guest) -> list[str]:
    text = bytes(guest.console[len(guest.console_before_go) :]).decode()
    return text[text.index("begin") :].splitlines()


def test_the_stages_come_in_order_with_rising_times(held: Guest) -> None:
    stages = [line.split(":") for line in held.lines if line.startswith("BOOT_TIME:")]
    names = ["init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop"]
    assert [stage for _, stage, _ in stages] == names
    times = [int(ns) for _, _, ns in stages]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_clock_reading_from_after_the_first_stages_comes_first_of_all(held: Guest) -> None:
    match = re.fullmatch(r"clock tsc=(\d+) ns=(\d+) tsc_end=(\d+)", held.lines[0])
    assert match is not None
    tsc, ns, tsc_end = map(int, match.groups())
    assert tsc < tsc_end
    stages = {stage: int(time) for _, stage, time in (line.split(":") for line in held.lines if ":" in line)}
    assert stages["uart_access_done"] <= ns <= stages["init_ok"]


def test_ready_stands_between_its_stage_and_the_command_loop(held: Guest) -> None:
    at = held.lines.index("READY")
    assert held.lines[at - 1].startswith("BOOT_TIME:ready:")
    assert held.lines[at + 1].startswith("BOOT_TIME:command_loop:")
    assert held.lines[at + 2] == "workload-pre-exec"


def test_an_armed_workload_does_not_run_before_its_go(held: Guest) -> None:
    assert b"begin" not in held.console_before_go
    assert held.lines.index("heartbeat counter=2") < held.lines.index("workload-exit code=7")


def test_heartbeats_count_from_one(held: Guest) -> None:
    beats = [int(line.partition("=")[2]) for line in held.lines if line.startswith("heartbeat")]
    assert beats == list(range(1, len(beats) + 1))


def test_go_sets_the_clock(held: Guest) -> None:
    assert 0 <= int(_console_after_go(held)[2]) - REALTIME_S < 60


def test_go_is_answered_once_it_took_effect_and_what_is_no_go_is_not(held: Guest) -> None:
    answered = [at for at, line in enumerate(held.lines) if line.startswith("go-done")]
    assert held.lines.index("heartbeat counter=2") < answered[0] < held.lines.index("workload-exit code=7")
    assert 0 <= _answers(held)[0][1] - REALTIME_S * SECOND_NS < 60 * SECOND_NS


def test_go_is_followed_at_any_time_and_counts_from_its_value_of_the_time_stamp_counter(held: Guest) -> None:
    before, begin = len(_answers(held)), clock_sample()
    held.send(b"go 5a %d\n" % (LATER_S * SECOND_NS))
    held.wait_for(rf"go-done tsc=\d+ realtime_ns={LATER_S}\d+")
    tsc, _ = _answers(held)[before]
    time.sleep(0.3)
    end = clock_sample()
    assert begin is not None
    assert end is not None
    khz = (end.tsc - begin.tsc) * 1_000_000 // (end.ns - begin.ns)
    held.send(b"tsc x 1\ntsc 5\ntsc %d %d\ngo 5a %d\n" % (tsc, khz, (LATER_S + 1000) * SECOND_NS))
    held.wait_for(rf"go-done tsc=\d+ realtime_ns={LATER_S + 1000}\d+")
    tsc_later, realtime_ns = _answers(held)[before + 1]
    passed_ns = (tsc_later - tsc) * 1_000_000 // khz
    assert passed_ns >= SECOND_NS * 3 // 10
    assert abs(realtime_ns - (LATER_S + 1000) * SECOND_NS - passed_ns) < 50_000_000


def test_pid_1_says_once_that_it_is_alone_when_all_that_the_workload_left_has_ended(held: Guest) -> None:
    assert held.lines.count("idle") == 1
    assert held.lines.index("workload-exit code=7") < held.lines.index("idle")


def test_the_workload_is_root_and_yet_cannot_reach_the_control_line(held: Guest) -> None:
    console = _console_after_go(held)
    assert console[1] == "0"
    assert f"ioperm={EPERM}" in console
    assert f"outb={KILLED_BY_SIGSEGV}" in console


def test_the_workload_can_neither_trace_pid_1_nor_turn_its_console_into_the_control_line(held: Guest) -> None:
    console = _console_after_go(held)
    assert f"attach={EPERM}" in console
    assert f"serial={EPERM}" in console


def test_a_program_that_the_kernel_runs_for_the_workload_cannot_reach_it_either(held: Guest) -> None:
    assert f"helper={EPERM}" in _console_after_go(held)


def test_what_the_workload_prints_stays_on_the_console(held: Guest) -> None:
    assert held.lines.count("READY") == 1
    assert "BOOT_TIME:init_entry:1" not in held.lines
    assert "BOOT_TIME:init_entry:1" in _console_after_go(held)


def test_a_listening_port_is_said_once(held: Guest) -> None:
    assert held.lines.count("listener proto=tcp port=8080") == 1


def test_all_output_comes_whole_and_byte_for_byte(held: Guest) -> None:
    assert bytes(held.console).endswith(b"x" * 20480 + END)


def test_the_exit_code_is_the_workload_s_and_the_guest_stays_until_told_to_power_off(held: Guest) -> None:
    assert "workload-exit code=7" in held.lines
    assert held.process.poll() is None
    assert held.power_off() == 0


LEAVES_A_LISTENER = """
(sleep 1; nc -l -p 8080 & sleep 0.5; kill $!) &
echo "$GREETING from $(uname -sn)"; kill -9 $$
"""


def test_without_a_window_the_workload_runs_at_once_and_a_signal_is_128_and_its_number(boot: Boot) -> None:
    guest = boot(workload_archive(["sh", "-c", LEAVES_A_LISTENER], ["GREETING=hello"]))
    assert guest.wait_for("workload-exit .*") == "workload-exit code=137"
    guest.wait_for_console(b"hello from Linux asyncvmm\n")
    guest.wait_for("idle")
    told = [guest.lines.index(line) for line in ("workload-exit code=137", "listener proto=tcp port=8080", "idle")]
    assert told == sorted(told)
    assert guest.power_off() == 0


def test_without_a_workload_pid_1_is_alone_at_once(boot: Boot) -> None:
    guest = boot(b"")
    guest.wait_for("heartbeat counter=1")
    assert "idle" in guest.lines
    assert guest.power_off() == 0
