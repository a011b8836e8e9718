"""COM1 and COM2 of a QEMU: two sockets, and the order in which the guest wrote to them, as far as that can be known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from asyncvmm.effects import Port, SerialOutput
from asyncvmm.errors import SnapshotDamaged
from asyncvmm.machine.pacing import Pacer
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.ordering import split_before_end

DRY_READS = 8
"""Most reads that empty the console before the control line is read; more is a guest that floods."""


MOST_LOOKS = 100
"""At what waits in the sockets. A FIFO takes a byte a turn of QEMU's loop, and has 16."""


class SerialLines:
    """Both lines. What comes in goes to ``pacer``; while that is busy the sockets keep it, and QEMU waits for room."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pacer: Pacer) -> None:
        self._pacer = pacer
        self._control = Channel(loop)
        self._console = Channel(loop)
        self.channels: Mapping[Port, Channel] = {"console": self._console, "control": self._control}

    @property
    def received(self) -> int:
        """Bytes the guest has written so far."""
        return self._control.received + self._console.received

    async def unread(self, turn: Callable[[], Awaitable[object]]) -> dict[str, bytes]:
        """What was sent to each line of a stopped guest, and QEMU leaves in its socket: it takes until a FIFO is full.

        ``turn`` returns when QEMU's loop has turned.
        """
        for _ in range(MOST_LOOKS):
            found: dict[str, bytes] = {port: channel.unread() for port, channel in self.channels.items()}
            await turn()
            if all(len(channel.unread()) == len(found[port]) for port, channel in self.channels.items()):
                break
        return found

    def send_unread(self, unread: Mapping[str, bytes]) -> None:
        """Send what was ``unread`` when a machine was saved. Raises SnapshotDamaged."""
        try:
            for port, channel in self.channels.items():
                if data := unread.get(port):
                    channel.send_unread(data)
        except OSError as error:
            raise SnapshotDamaged("serial input", expected="what a line can hold", found=error.strerror) from error

    def watch(self) -> None:
        """QEMU has its ends: close ours of them, and listen."""
        for channel in self.channels.values():
            channel.remember_sent()
            channel.peer.close()
            channel.watch(self._read)

    def _read(self) -> None:
        if not self._pacer.busy:
            self.hand_out()

    def hand_out(self) -> bool:
        """Hand out what both lines have; whether there was any.

        The sockets do not say what came first. PID 1 drains its console before each line that begins or ends the
        workload, or that ends the boot: so of lines and console bytes found together, the end comes after the bytes,
        everything else before them. The console is read second: what the guest wrote on it before such an end is there
        by then.
        """
        control = self._take("control")
        console: list[SerialOutput] = []
        for _ in range(DRY_READS):
            taken = self._take("console")
            if not taken:
                break
            console += taken
        before, after = split_before_end(control)
        effects = [*before, *console, *after]
        if effects:
            self._pacer.put(effects)
        return bool(effects)

    def _take(self, port: Port) -> list[SerialOutput]:
        data = self.channels[port].read()
        if not data:
            return []
        newlines = data.count(b"\n")
        return [SerialOutput(port, data, (time.monotonic_ns(),) * newlines)]

    def close(self) -> None:
        """Close both. May be called again."""
        for channel in self.channels.values():
            channel.close()
