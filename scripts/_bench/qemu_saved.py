"""QEMU by itself, saved and restored as directly as it can be: a state of devices alone in one file, memory in another.

The memory is a file that is shared when it is saved (QEMU leaves it out of the state then, x-ignore-shared) and private
when it is restored, as with our own snapshots.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from _bench.bench import Skipped
from asyncvmm.machine.qemu.binary import find_qemu

_TIMEOUT_S = 60.0
_IGNORE_SHARED: dict[str, Any] = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


@attrs.frozen
class QemuSaved:
    """What a QEMU has left: its state, and its memory."""

    state: Path
    memory: Path
    memory_mib: int
    accel: str

    def first_output(self) -> float:
        """Nanoseconds from exec of a QEMU that goes on from there to its guest's first output. Raises Skipped."""
        with self.state.open("rb") as state:
            orders = _orders(state.fileno())
            begin = time.monotonic_ns()
            with _running(self, ["-incoming", "defer"], "off", state.fileno(), orders=orders) as (console, _):
                if not console.recv(1):
                    raise Skipped("QEMU has ended instead of going on")
                return float(time.monotonic_ns() - begin)


def save_by_qemu(guest: Path, holder: Path, memory_mib: int, accel: str, told: bytes) -> QemuSaved:
    """Boot ``guest``, say ``told`` to it, and save it once it answers. Raises Skipped if QEMU does not do so."""
    saved = QemuSaved(holder / "state", holder / "memory", memory_mib, accel)
    with saved.memory.open("wb") as memory:
        memory.truncate(memory_mib << 20)
    with _running(saved, ["-kernel", str(guest)], "on") as (console, qmp):
        monitor = _Monitor(qmp)
        heard = b""
        while b"READY\n" not in heard:
            heard += console.recv(4096) or _ended()
        console.sendall(told)
        if not console.recv(1):
            _ended()
        monitor.ask("migrate-set-capabilities", **_IGNORE_SHARED)
        monitor.ask("migrate", uri=f"exec:cat > {saved.state}")
        while (status := monitor.ask("query-migrate")["status"]) != "completed":
            if status in ("failed", "cancelled"):
                raise Skipped(f"QEMU's migration to a file has {status}")
            time.sleep(0.01)
    return saved


def _orders(state: int) -> bytes:
    """What a QEMU finds waiting for it on QMP: to take the state from this descriptor. It runs on by itself then."""
    orders: dict[str, dict[str, Any]] = {
        "qmp_capabilities": {},
        "migrate-set-capabilities": _IGNORE_SHARED,
        "migrate-incoming": {"uri": f"fd:{state}"},
    }
    return b"".join(_command_line(command, arguments) for command, arguments in orders.items())


def _command_line(command: str, arguments: dict[str, Any]) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"


def _ended() -> bytes:
    raise Skipped("QEMU has ended before its guest was ready")


class _Monitor:
    """QMP, one command after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rwb")
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What it returns. Raises Skipped for an error."""
        self._lines.write(_command_line(command, arguments))
        self._lines.flush()
        while line := self._lines.readline():
            said = json.loads(line)
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise Skipped(f"QEMU refuses {command}: {said['error'].get('desc')}")
        raise Skipped(f"QEMU has ended at {command}")


@contextmanager
def _running(
    saved: QemuSaved, words: list[str], share: str, *fds: int, orders: bytes = b""
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A QEMU; gives the other ends of its guest's COM1 and of QMP. Killed after the block."""
    console, its_console = socket.socketpair()
    qmp, its_qmp = socket.socketpair()
    qmp.sendall(orders)
    with console, qmp:
        with its_console, its_qmp:
            command = _command(saved, share, its_console.fileno(), its_qmp.fileno())
            child = subprocess.Popen(
                [*command, *words],
                pass_fds=[its_console.fileno(), its_qmp.fileno(), *fds],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        for connection in (console, qmp):
            connection.settimeout(_TIMEOUT_S)
        try:
            yield console, qmp
        except TimeoutError:
            raise Skipped("QEMU says nothing") from None
        finally:
            with suppress(ProcessLookupError):
                child.kill()
            child.wait()


def _command(saved: QemuSaved, share: str, console: int, qmp: int) -> list[str]:
    memory = f"memory-backend-file,id=ram,size={saved.memory_mib}M,mem-path={os.fspath(saved.memory)},share={share}"
    return [
        *(str(find_qemu().path), "-M", "microvm,memory-backend=ram", "-object", memory, "-accel", saved.accel),
        *("-m", f"{saved.memory_mib}M", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"),
        *("-chardev", f"socket,id=com1,fd={console}", "-serial", "chardev:com1"),
        *("-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control", "-no-reboot"),
    ]
