"""COM1 and COM2 of a QEMU: two sockets, and the order in which the guest wrote to them, as far as that can be known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from asyncvmm.effects import Port, SerialOutput
from asyncvmm.machine.pacing import Pacer
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.ordering import split_before_end

DRY_READS = 8
"""Most reads that empty the console before the control line is read; more is a guest that floods."""


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

    def watch(self) -> None:
        """QEMU has its ends: close ours of them, and listen."""
        for channel in self.channels.values():
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
