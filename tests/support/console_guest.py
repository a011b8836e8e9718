"""A virtio console, and Linux' driver of it."""

from __future__ import annotations

import struct
from typing import Any

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console.control import DEVICE_READY, PORT_OPEN, PORT_READY, Control
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, VirtioConsole
from asyncvmm.devices.virtio.console.port import ConsolePort
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.testing.driver import Driver

RECEIVE, TRANSMIT = 0, 1
DATA_RECEIVE, DATA_TRANSMIT = 4, 5
TWO = ConsoleConfig(ports=("data", "more"))


def console(config: ConsoleConfig = TWO, backlog_bytes: int = 1000) -> VirtioConsole:
    return VirtioConsole(config, ConsoleMetrics(), backlog_bytes=backlog_bytes)


class Linux(Driver):
    """A driver with buffers for control messages."""

    def __init__(self, device: VirtioConsole, *, buffers: int = 16, **options: Any) -> None:
        super().__init__(device, **options)
        if len(self.queues) > 2:
            self.listen(buffers)

    def listen(self, buffers: int) -> None:
        """Offer so many buffers for control messages."""
        for _ in range(buffers):
            self.send(CONTROL_RECEIVE, writable=[64])
        self.kick(CONTROL_RECEIVE)

    def tell(self, port: int, event: int, value: int = 1) -> None:
        """Send a control message."""
        self.request(CONTROL_TRANSMIT, [struct.pack("<IHH", port, event, value)])

    def heard(self) -> list[Control]:
        """The device's control messages; their buffers are offered again."""
        messages = [Control.parse(used.data) for used in self.used(CONTROL_RECEIVE)]
        self.listen(len(messages))
        return messages

    def bring_up(self) -> None:
        """As Linux does, with each named port opened."""
        self.tell(0, DEVICE_READY)
        for port in range(3):
            self.tell(port, PORT_READY)
            self.tell(port, PORT_OPEN)
        self.heard()


def up(device: VirtioConsole) -> Linux:
    driver = Linux(device)
    driver.bring_up()
    return driver


def read(device: VirtioConsole, port: ConsolePort) -> bytes:
    """All there is, as a reader takes it."""
    data = b""
    with device.session():
        port.reading = True
        while port.backlog:
            data += port.take(64)
            device.take_more(port)
    return data
