"""A serial port whose polled accesses the native run loop may answer: told what to answer, asked what it kept aside.

It stands between the bus and the device and keeps them in step: bytes posted natively join the device's output before
the device is touched, and after each touch the run loop hears what LSR reads as and whether THR writes may be posted.
The caller holds the port's lock around every call.

There is one ring for posted bytes, and the console has it. The control line's LSR alone is answered: a guest's PID 1
looks there for orders as long as it lives, and writes a line now and then.
"""

from __future__ import annotations

import attrs

from asyncvmm.devices.serial import LSR, THR, Serial
from asyncvmm.machine.kvm.exits import io_key
from asyncvmm.machine.kvm.fastpath.binding import CONSTANT_READ, OFF, POSTED_WRITE, Fastpath


@attrs.frozen
class Slots:
    """Which of the run loop's slots a port has; without one for THR its writes are never posted."""

    lsr: int
    thr: int | None = None


CONSOLE_SLOTS = Slots(lsr=0, thr=1)
CONTROL_SLOTS = Slots(lsr=2)


class PolledSerial:
    """The ByteDevice that the bus sees in place of ``device``."""

    def __init__(self, device: Serial, fastpath: Fastpath, first_port: int, slots: Slots) -> None:
        self._device = device
        self._fastpath = fastpath
        self._data = fastpath.data
        self._lsr_slot, self._thr_slot = slots.lsr, slots.thr
        self._lsr_key = io_key(False, 1, first_port + LSR)
        self._thr_key = io_key(True, 1, first_port + THR)
        self._lsr: int | None = None
        self._posts = False
        self.publish()

    def read(self, offset: int) -> int:
        """The guest reads a register."""
        self.collect()
        value = self._device.read(offset)
        self.publish()
        return value

    def write(self, offset: int, value: int) -> None:
        """The guest writes a register."""
        self.collect()
        self._device.write(offset, value)
        self.publish()

    def collect(self) -> None:
        """Hand the device what was posted."""
        if self._thr_slot is not None and self._data.used:
            self._device.post(*self._fastpath.take())

    def publish(self) -> None:
        """Tell the run loop what it may answer from now on."""
        lsr = self._device.constant_lsr
        if lsr != self._lsr:
            self._lsr = lsr
            self._fastpath.set(self._lsr_slot, self._lsr_key, OFF if lsr is None else CONSTANT_READ, lsr or 0)
        if self._thr_slot is not None and (posts := self._device.posts_writes) != self._posts:
            self._posts = posts
            self._fastpath.set(self._thr_slot, self._thr_key, POSTED_WRITE if posts else OFF)
