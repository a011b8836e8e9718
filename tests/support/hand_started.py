"""A guest whose QEMU a test starts by itself, to see PID 1 without anything of asyncvmm's VMs in between."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from asyncvmm.accel import probe_kvm
from asyncvmm.guest.image import Image

TIMEOUT_S = 120
CMDLINE = "console=ttyS0 quiet loglevel=3 8250.nr_uarts=1 panic=-1"
MACHINES = {
    "q35": ["-M", "q35"],
    "microvm": ["-M", "microvm,acpi=on,isa-serial=off,auto-kernel-cmdline=off"],
}
QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-nographic", "-no-reboot"]


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

    def end(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        self.control.close()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def start_guest(
    image: Image, appended: bytes, directory: Path, devices: Sequence[str] = (), machine: str = "q35"
) -> Guest:
    """A machine that boots ``image`` with an archive for PID 1 behind its initrd."""
    initrd, path = directory / "initrd", directory / "control"
    initrd.write_bytes(image.initrd.read_bytes() + appended)
    # COM2 before COM1: QEMU's DSDT lists them the other way round, and with one UART allowed Linux takes the first.
    ports = [
        *("-chardev", f"socket,id=control,path={path},server=on,wait=off"),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-device", "isa-serial,chardev=control,index=1,iobase=0x2f8,irq=3"),
        *("-device", "isa-serial,chardev=console,index=0,iobase=0x3f8,irq=4"),
    ]
    tsc_khz = probe_kvm().tsc_khz if machine == "microvm" else None
    cmdline = f"tsc_early_khz={tsc_khz} tsc=reliable {CMDLINE}" if tsc_khz else CMDLINE
    kernel = ["-kernel", str(image.kernel), "-initrd", str(initrd), "-append", cmdline]
    process = subprocess.Popen(
        [*QEMU, *MACHINES[machine], *ports, *devices, *kernel],
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
