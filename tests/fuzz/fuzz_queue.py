"""Transport and queues under attack, with the plainest of devices behind them, which holds chains for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncvmm.devices.checks import integer
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.script import Script
from tests.fuzz.target import Target

HOLDING, ECHO, PARTIAL = range(3)
"""What each queue is for: chains that come back later, at once, and of which some are given back to the queue."""


class Echo(VirtioDevice):
    """Writes what it reads, or as much as fits. A number that the driver may write is in its configuration space."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__((8, 16, 4), 0xFF, bytes(8), object())
        self.held: list[Chain] = []

    def process(self, index: int) -> bool:
        """See VirtioDevice."""
        queue = self.queues[index]
        for _ in queue.turn(4):
            chain = queue.pop()
            if chain is None:
                return False
            if index == HOLDING:
                self.held.append(chain)
            elif index == PARTIAL and chain.readable_size % 2:
                queue.undo_pop()
                return False
            else:
                self.answer(chain, index)
        return queue.available() > 0

    def answer(self, chain: Chain, index: int) -> None:
        """Give a chain back."""
        queue = self.queues[index]
        if queue.is_current(chain):
            data = chain.read()
            assert len(data) == chain.readable_size
            assert chain.read(7, 3) == data[3:10]
            written = chain.write(data[: chain.writable_size])
            assert written == min(len(data), chain.writable_size)
            queue.push(chain, written)

    def write_config(self, offset: int, data: bytes) -> None:
        """See VirtioDevice."""
        if offset >= 4:
            raise GuestFault("a part of the configuration space that nobody must write")
        self.config[offset : offset + len(data)] = data
        self.config_changed()

    def drain(self) -> bool:
        """See VirtioDevice."""
        return not self.held

    def state(self) -> dict[str, Any]:
        """See VirtioDevice."""
        return {"number": 7}

    def restore_config(self, config: bytes) -> None:
        """See VirtioDevice. Whatever the driver wrote."""
        self.config[:] = config

    def restore(self, state: Mapping[str, Any]) -> None:
        """See VirtioDevice."""
        integer(state, "number", 7)


class QueueTarget(Target):
    """See Echo."""

    def make(self, script: Script) -> VirtioDevice:
        """See Target."""
        self.device = Echo()
        return self.device

    def event(self, script: Script) -> None:
        """Some of what is held comes back, in any order; or the configuration changes."""
        if script.byte() % 4 == 0:
            self.device.config_changed()
        for _ in range(script.byte() % 4):
            if self.device.held:
                self._finish(script.byte() % len(self.device.held))

    def settle(self) -> None:
        """See Target."""
        while self.device.held:
            self._finish(0)

    def _finish(self, place: int) -> None:
        chain = self.device.held.pop(place)
        with self.device.session() as alive:
            if alive:
                self.device.answer(chain, HOLDING)

    def may_wait(self, index: int) -> bool:
        """See Target."""
        return index == PARTIAL

    def serves(self, driver: Driver) -> None:
        """See Target."""
        assert driver.request(ECHO, [b"abc", b"def"], [4, 4]) == b"abcdef"
        assert driver.request(PARTIAL, [b"ab"], [4]) == b"ab"
        driver.send(HOLDING, [b"x"], [1])
        driver.kick(HOLDING)
        self.settle()
        assert [used.data for used in driver.used(HOLDING)] == [b"x"]


def run(data: bytes) -> None:
    """One script."""
    play(QueueTarget(), data)
