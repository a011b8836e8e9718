"""PID 1 in a real Linux on QEMU/TCG: what it says on the control line, and what a workload cannot do to it."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from asyncvmm.guest import cpio
from asyncvmm.guest.archive import workload_archive
from asyncvmm.guest.image import Image, find_image
from tests.support.requirements import require

TIMEOUT_S = 120
CMDLINE = "console=ttyS0 quiet 8250.nr_uarts=1 panic=-1"
MACHINE = [
    *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256"),
    *("-nodefaults", "-nographic", "-no-reboot"),
]
REALTIME_S = 1_234_567_890

PROBES = {
    # ioperm(0x2f8, 8, 1); exit(errno)
    "ioperm": "b8ad000000 bff8020000 be08000000 ba01000000 0f05 f7d8 89c7 b83c000000 0f05",
    # outb('X', 0x2f8); exit(0)
    "outb": "baf8020000 b058 ee 31ff b83c000000 0f05",
    # ptrace(PTRACE_ATTACH, 1, 0, 0); exit(errno)
    "attach": "b865000000 bf10000000 be01000000 31d2 4531d2 0f05 f7d8 89c7 b83c000000 0f05",
    # ioctl(1, TIOCGSERIAL, &s); s.port = 0x2f8; ioctl(1, TIOCSSERIAL, &s); exit(errno)
    "serial": "b810000000 bf01000000 be1e540000 488d942400ffffff 0f05 c74208f8020000 b810000000 be1f540000 0f05"
    " f7d8 89c7 b83c000000 0f05",
}
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


def _program(code: str) -> bytes:
    """A static x86-64 program of this machine code: one segment, loaded at 4 MiB."""
    body = bytes.fromhex(code)
    size, base = 120 + len(body), 0x400000
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + 120, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + body


@attrs.define
class Guest:
    """A running QEMU. ``lines`` is what came on the control line so far, ``console`` what came on COM1."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    lines: list[str] = attrs.Factory(list)
    console: bytearray = attrs.Factory(bytearray)
    console_before_go: bytes = b""
    ended: bool = False
    changed: threading.Condition = attrs.Factory(threading.Condition)

    def read_control(self) -> None:
        for line in self.control.makefile("rb"):
            with self.changed:
                self.lines.append(line.decode().rstrip("\n"))
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def read_console(self) -> None:
        assert self.process.stdout is not None
        while chunk := self.process.stdout.read1(65536):  # type: ignore[attr-defined]
            with self.changed:
                self.console += chunk
                self.changed.notify_all()

    def wait_for(self, pattern: str) -> str:
        """The first control line, past or to come, that matches."""

        def found() -> str | None:
            return next((line for line in self.lines if re.fullmatch(pattern, line)), None)

        with self.changed:
            assert self.changed.wait_for(lambda: found() or self.ended, TIMEOUT_S), self.lines
            line = found()
        assert line is not None, (pattern, self.lines, bytes(self.console[-2000:]))
        return line

    def wait_for_console(self, text: bytes) -> None:
        """Until the console has shown this; it is in the pipe already if PID 1 said so on the control line."""
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.console, TIMEOUT_S), bytes(self.console[-2000:])

    def send(self, text: bytes) -> None:
        self.control.sendall(text)

    def power_off(self) -> int:
        self.send(b"poweroff\n")
        return self.process.wait(TIMEOUT_S)


Boot = Callable[[bytes], Guest]


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boot]:
    require("qemu")
    require("image")
    image = find_image()
    guests: list[Guest] = []

    def start(appended: bytes) -> Guest:
        guests.append(_start(image, appended, tmp_path_factory.mktemp("guest")))
        return guests[-1]

    yield start
    for guest in guests:
        _end(guest)


def _start(image: Image, appended: bytes, directory: Path) -> Guest:
    initrd, path = directory / "initrd", directory / "control"
    initrd.write_bytes(image.initrd.read_bytes() + appended)
    # COM2 before COM1: QEMU's DSDT lists them the other way round, and with one UART allowed Linux takes the first.
    devices = [
        *("-chardev", f"socket,id=control,path={path},server=on,wait=off"),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-device", "isa-serial,chardev=control,index=1", "-device", "isa-serial,chardev=console,index=0"),
    ]
    process = subprocess.Popen(
        [*MACHINE, *devices, "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", CMDLINE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    guest = Guest(process, _connect(path, process))
    for reader in (guest.read_control, guest.read_console):
        threading.Thread(target=reader, daemon=True).start()
    return guest


def _connect(path: Path, process: subprocess.Popen[bytes]) -> socket.socket:
    control = socket.socket(socket.AF_UNIX)
    while process.poll() is None:
        try:
            control.connect(str(path))
            return control
        except OSError:
            time.sleep(0.01)
    raise AssertionError(f"qemu ended with {process.returncode}")


def _end(guest: Guest) -> None:
    guest.process.kill()
    guest.process.wait()
    guest.control.close()
    for stream in (guest.process.stdin, guest.process.stdout):
        if stream is not None:
            stream.close()


@pytest.fixture(scope="session")
def held(boot: Boot) -> Guest:
    """An armed workload that stands in the pre-exec window for two heartbeats, gets rubbish, then its go."""
    probes = cpio.write(cpio.file(f"probe/{name}", _program(code), 0o755) for name, code in PROBES.items())
    guest = boot(probes + workload_archive(["sh", "-c", HOSTILE], arm_pre_exec=True))
    guest.wait_for("workload-pre-exec")
    guest.send(b"rubbish\n" + b"x" * 2000 + b"\ngo\ngo zz 1\ngo 00 \ngo 00 99999999999999999999999\n")
    guest.wait_for("heartbeat counter=2")
    guest.console_before_go = bytes(guest.console)
    guest.send(b"go " + b"a5" * 32 + f" {REALTIME_S}000000000\n".encode())
    guest.wait_for("workload-exit .*")
    guest.wait_for_console(END)
    return guest


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


def test_without_a_window_the_workload_runs_at_once_and_a_signal_is_128_and_its_number(boot: Boot) -> None:
    guest = boot(workload_archive(["sh", "-c", 'echo "$GREETING from $(uname -sn)"; kill -9 $$'], ["GREETING=hello"]))
    assert guest.wait_for("workload-exit .*") == "workload-exit code=137"
    guest.wait_for_console(b"hello from Linux asyncvmm\n")
    assert guest.power_off() == 0
