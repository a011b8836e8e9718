"""A well-behaved driver whose memory is observed, as tests/fuzz/guest.py misuses it."""

from __future__ import annotations

from asyncvmm.devices.virtio import mmio
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.testing import Driver, DriverQueue
from tests.fuzz.memory import ObservedView

SHARE = 0x2000
"""Bytes of RAM for each queue: rings, and buffers behind them."""


class ObservedDriver(Driver):
    """The driver, with its memory observed."""

    view: ObservedView

    def new_transport(self, device: VirtioDevice) -> mmio.VirtioMmio:
        """As Driver, but of the observed memory."""
        if not isinstance(self.view, ObservedView):
            self.view = ObservedView(self.memory)
        return super().new_transport(device)

    def _set_up(self, index: int, share: int) -> DriverQueue:
        wanted = self._queue_size
        self._queue_size = min(wanted or 16, self.device.queues[index].max_size)
        try:
            return super()._set_up(index, share)
        finally:
            self._queue_size = wanted
