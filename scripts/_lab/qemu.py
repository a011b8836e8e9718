"""The outer machine: a QEMU child, its virtio ports on pipes, and its end in every case.

Standard output, standard error and the exit code have a port each, so nothing is read off a console and bytes arrive
as the command wrote them. A fourth brings a pulse: QEMU's VMRUN and #VMEXIT (helper_vmrun, do_vmexit, 7.2 to 10.0)
change a CPU's ``interrupt_request`` without its lock and now and then undo what another thread just set in it. What is
lost so is the word that the local APIC has something, the timer's interrupt in most cases, and an idle Linux sleeps for
ever. Each further interrupt makes the CPU look again.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import attrs

from _lab.kernel import OuterKernel
from asyncvmm.errors import HostError

TIMED_OUT = 124
LAB_FAILED = 125
_CHUNK = 1 << 16
_PORTS = ("stdout", "stderr", "exit-code")
_PULSE = "pulse"
_PULSE_S = 0.05
_CPU = "max,-xsave"
"""QEMU's SVM does not intercept XSETBV: KVM would not learn of a guest's XCR0 and run it with another one."""

_CMDLINE = (
    "console=ttyS0 quiet panic=-1 reboot=t mitigations=off tsc=reliable no_timer_check random.trust_cpu=on "
    "nowatchdog audit=0 raid=noautodetect"
)


@attrs.frozen
class Outer:
    """The outer machine of one run. ``memory`` in MiB, ``timeout`` in seconds, ``more`` is words for QEMU.

    ``cpus`` is best one. QEMU's VMRUN (helper_vmrun, 7.2 to 10.0) leaves the vector of an interrupt that it injected in
    ``exception_index``, and whatever makes that CPU look up before its next exit (another CPU's exclusive section or,
    with one thread for all, the turn of another CPU) delivers the vector once more, interrupts off or not: guests die
    of triple faults or wait for a lock that they hold. With one CPU nothing makes it look up but interrupts, and those
    end in an exit first.

    With any number, VMRUN before 9.1 does not load INTERRUPT_SHADOW: a guest whose STI was followed by an exit may take
    the interrupt that it waits for before its HLT, and sleep on. Linux' next timer wakes it; the tests' tiny guests
    leave such a HLT out, see tests/guests/kvm/machine.inc.
    """

    kernel: OuterKernel
    system: Path
    project: Path
    memory: int
    cpus: int
    timeout: float
    console: bool
    more: list[str]


def run(outer: Outer) -> int:
    """Boot, relay, and return the command's exit code, TIMED_OUT or LAB_FAILED. Raises HostError."""
    signal.signal(signal.SIGTERM, _raise_exit)
    with tempfile.TemporaryFile() as log, _pulse() as (heard, beaten), _child(outer, log, heard) as pipes:
        relay = _Relay(pipes, beaten, time.monotonic() + outer.timeout)
        code = relay.run()
        if code == LAB_FAILED:
            _show_console(log)
        elif code == TIMED_OUT:
            print(f"lab: killed after {outer.timeout:g} s", file=sys.stderr)
        return code


def _raise_exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _pulse() -> Iterator[tuple[int, int]]:
    """The end that QEMU gets, and the one to beat at: a beat that there is no room for is left out."""
    heard, beaten = socket.socketpair()
    beaten.setblocking(False)
    with heard, beaten:
        yield heard.fileno(), beaten.fileno()


@contextmanager
def _child(outer: Outer, log: BinaryIO, pulse: int) -> Iterator[dict[str, int]]:
    pipes = {name: os.pipe() for name in _PORTS}
    writers = [pipes[name][1] for name in _PORTS]
    command = _command(outer, writers, pulse)
    console = sys.stderr.buffer if outer.console else log
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=[*writers, pulse]
    )
    try:
        for writer in writers:
            os.close(writer)
        yield {name: pipes[name][0] for name in _PORTS}
    finally:
        child.kill()
        child.wait()


def _command(outer: Outer, writers: list[int], pulse: int) -> list[str]:
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise HostError("qemu-system-x86_64", expected="it installed", found="not on the path")
    setpriv = shutil.which("setpriv")
    return [
        *([setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []),
        qemu, "-M", "q35,hpet=off", "-accel", "tcg,tb-size=512", "-cpu", _CPU,
        "-smp", str(outer.cpus), "-m", str(outer.memory),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", str(outer.kernel.kernel), "-initrd", str(outer.kernel.initrd), "-append", _CMDLINE,
        *_disk("system", outer.system), *_disk("project", outer.project),
        "-device", "virtio-serial-pci",
        *outer.more,
        *(word for name, fd in zip(_PORTS, writers, strict=True) for word in _output(name, fd)),
        *_port(_PULSE, f"socket,id={_PULSE},fd={pulse}"),
    ]  # fmt: skip


def _disk(name: str, path: Path) -> tuple[str, ...]:
    drive = f"if=none,id={name},file={_escape(path)},format=raw,readonly=on,cache=unsafe"
    return ("-drive", drive, "-device", f"virtio-blk-pci,drive={name}")


def _output(name: str, fd: int) -> tuple[str, ...]:
    return ("-add-fd", f"fd={fd},set={fd}", *_port(name, f"file,id={name},path=/dev/fdset/{fd},append=on"))


def _port(name: str, chardev: str) -> tuple[str, ...]:
    return ("-chardev", chardev, "-device", f"virtserialport,chardev={name},name={name}")


def _escape(path: Path) -> str:
    """QEMU's option lists are split at commas; a doubled one stands for itself."""
    return str(path).replace(",", ",,")


class _Relay:
    """Copies two pipes to our own output until the third has brought the exit code, or the end has come."""

    def __init__(self, pipes: dict[str, int], pulse: int, deadline: float) -> None:
        self._pulse, self._deadline = pulse, deadline
        self._code = b""
        self._selector = selectors.DefaultSelector()
        sinks: dict[str, Callable[[bytes], None]] = {
            "stdout": lambda data: _write_all(1, data),
            "stderr": lambda data: _write_all(2, data),
            "exit-code": self._take_code,
        }
        for name, reader in pipes.items():
            os.set_blocking(reader, False)
            self._selector.register(reader, selectors.EVENT_READ, sinks[name])

    def run(self) -> int:
        while self._selector.get_map():
            left = self._deadline - time.monotonic()
            if left <= 0:
                return TIMED_OUT
            self._turn(min(left, _PULSE_S))
            self._beat()
            if self._code.endswith(b"\n"):
                self._turn(0)
                return int(self._code)
        return LAB_FAILED

    def _beat(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pulse, b".")

    def _turn(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            while data := self._read(key.fd):
                key.data(data)

    def _read(self, fd: int) -> bytes:
        """What is there; nothing when there is nothing yet, and at the end, which also ends the watch."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            self._selector.unregister(fd)
        return data

    def _take_code(self, data: bytes) -> None:
        self._code += data


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _show_console(log: BinaryIO) -> None:
    log.seek(0)
    tail = log.read()[-8192:].decode(errors="replace")
    print(f"lab: the outer machine ended without an exit code; its console:\n{tail}", file=sys.stderr)
