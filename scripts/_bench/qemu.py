"""QEMU as a peer: a child with the guest's COM1 on a socket that the bench's loop reads."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from pathlib import Path

from asyncvmm.machine.qemu.binary import find_qemu

CHUNK = 65536


class QemuPeer:
    """One QEMU microvm. ``start`` executes it; ``read`` gives what its guest printed."""

    def __init__(self, guest: Path, accel: str, memory_mib: int) -> None:
        self._guest, self._accel, self._memory_mib = guest, accel, memory_mib
        self._binary = find_qemu().path

    def start(self) -> int:
        """Execute QEMU; CLOCK_MONOTONIC ns of just before."""
        self._console, theirs = socket.socketpair()
        self._console.setblocking(False)
        begin = time.monotonic_ns()
        with theirs:
            self._child = subprocess.Popen(
                self._command(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        return begin

    async def read(self) -> bytes:
        """Some bytes of COM1; none once QEMU has ended."""
        return await asyncio.get_running_loop().sock_recv(self._console, CHUNK)

    def stop(self) -> None:
        """Kill and reap it."""
        self._child.kill()
        self._child.wait()
        self._console.close()

    def _command(self, fd: int) -> list[str]:
        return [
            *(str(self._binary), "-M", "microvm", "-accel", self._accel, "-m", f"{self._memory_mib}M", "-smp", "1"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", f"socket,id=com1,fd={fd}", "-serial", "chardev:com1"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel", str(self._guest)),
        ]
