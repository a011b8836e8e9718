"""A virtio device that writes back what it reads, for tests of whatever serves one."""

from __future__ import annotations

import attrs

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_DRIVER_OK, STATUS_FEATURES_OK
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Chain

UP = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK


@attrs.define
class Counters:
    activate_fails: int = 0
    cfg_fails: int = 0
    event_fails: int = 0


class Echo(VirtioDevice):
    """Writes back what it reads, upper case; holds chains back while told to."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__((64, 4), 0b1010, b"\x01\x02\x03\x04", Counters())
        self.holding = False
        self.held: list[Chain] = []
        self.refuse = False

    def activate(self) -> None:
        if self.refuse:
            raise GuestFault("not today")

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        for _ in range(2):
            chain = queue.pop()
            if chain is None:
                return False
            if self.holding:
                self.held.append(chain)
            else:
                self.finish(index, chain)
        return True

    def finish(self, index: int, chain: Chain) -> None:
        if self.queues[index].is_current(chain):
            self.queues[index].push(chain, chain.write(chain.read().upper()))
