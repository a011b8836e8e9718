"""A serial port whose polled accesses the native run loop may answer: told what to answer, asked what it kept aside.

It stands between the bus and the device and keeps them in step: bytes posted natively join the device's output before
the device is touched, and after each touch the run loop hears what LSR reads as and whether THR writes may be posted.
The caller holds the port's lock around every call.
"""

from __future__ import annotations

from asyncvmm.devices.serial import LSR, THR, Serial
from asyncvmm.machine.kvm.exits import io_key
from asyncvmm.machine.kvm.fastpath.binding import CONSTANT_READ, OFF, POSTED_WRITE, Fastpath

_LSR_SLOT, _THR_SLOT = 0, 1


class PostedSerial:
    """The ByteDevice that the bus sees in place of ``device``."""

    def __init__(self, device: Serial, fastpath: Fastpath, first_port: int) -> None:
        self._device = device
        self._fastpath = fastpath
        self._data = fastpath.data
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
        if self._data.used:
            self._device.post(*self._fastpath.take())

    def publish(self) -> None:
        """Tell the run loop what it may answer from now on."""
        lsr, posts = self._device.constant_lsr, self._device.posts_writes
        if lsr != self._lsr:
            self._lsr = lsr
            self._fastpath.set(_LSR_SLOT, self._lsr_key, OFF if lsr is None else CONSTANT_READ, lsr or 0)
        if posts != self._posts:
            self._posts = posts
            self._fastpath.set(_THR_SLOT, self._thr_key, POSTED_WRITE if posts else OFF)
