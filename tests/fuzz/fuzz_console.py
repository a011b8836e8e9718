"""The console under attack: its ports are opened, read and closed by somebody who does not know what the guest does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.virtio.console import control
from asyncvmm.devices.virtio.console import device as console
from asyncvmm.devices.virtio.console.control import Control
from asyncvmm.devices.virtio.console.device import CONTROL_RECEIVE, CONTROL_TRANSMIT, VirtioConsole
from asyncvmm.devices.virtio.console.port import ConsolePort
from asyncvmm.metrics.groups import ConsoleMetrics
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.limits import lowered
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

BACKLOG = 32
_CONTROL = 8
_CONFIGS = (ConsoleConfig(ports=("data",)), ConsoleConfig())


class ConsoleTarget(Target):
    """Port 0, and perhaps a named one."""

    def __init__(self) -> None:
        self.config: ConsoleConfig | None = None

    def make(self, script: Script) -> VirtioConsole:
        """See Target."""
        self.config = self.config or script.pick(_CONFIGS)
        self.device = VirtioConsole(self.config, ConsoleMetrics(), backlog_bytes=BACKLOG)
        return self.device

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        if index == CONTROL_TRANSMIT:
            event = script.pick((control.DEVICE_READY, control.PORT_READY, control.PORT_OPEN, 7, script.byte()))
            return [Control(script.byte() % 3, event, int(script.byte() % 4 > 0)).to_bytes()], []
        if index == CONTROL_RECEIVE:
            return [], [script.pick((64, 16, 8, 7))]
        if index % 2:
            return [script.data(1 + script.byte() % 200) for _ in range(1 + script.byte() % 2)], []
        return [], [1 + script.byte() % 64]

    def event(self, script: Script) -> None:
        """What PortStream does, in any order."""
        port = script.pick(self.device.ports)
        kind = script.byte() % 6
        with self.device.session() as alive:
            if kind == 0:
                self.device.open_port(port)
            elif kind == 1:
                self.device.close_port(port)
            elif kind == 2:
                self._read(port, 1 + script.byte(), alive=alive)
            elif kind == 3 and port.host_open:
                port.input = memoryview(script.data(script.size() % 1000))
                if alive:
                    self.device.feed(port)
            elif kind == 4 and alive:
                for _ in range(script.byte() % 16):
                    self.device.resize(script.byte(), script.byte())
            elif kind == 5:
                port.input = memoryview(b"")

    def _read(self, port: ConsolePort, most: int, *, alive: bool) -> None:
        port.reading = True
        data = port.take(most) if port.backlog else b""
        assert len(data) <= most
        if alive:
            self.device.take_more(port)

    def check(self) -> None:
        """See Target."""
        for port in self.device.ports:
            assert port.backlog == sum(map(len, port.pieces))
            assert 0 <= port.backlog <= BACKLOG, "more is kept than was promised"
        assert len(self.device._messages) <= _CONTROL + 2 * console.MOST_CHAINS, "messages pile up"

    def may_wait(self, index: int) -> bool:
        """Receive queues wait for input; a sender waits for a reader, and for the driver to fetch messages."""
        device = self.device
        if index == CONTROL_TRANSMIT:
            return not device.multiport or len(device._messages) >= _CONTROL
        port = device._port_of(index) if index % 2 else None
        return port is None or (port.throttled and port.room <= 0)

    def comparable(self, state: Mapping[str, Any]) -> Any:
        """Nobody has a port open after a restore, and the driver is told so."""
        device = dict(state["device"], messages=None)
        queues = [dict(queue, next_used=0, next_avail=0, signalled=0) for queue in state["queues"]]
        return dict(state, device=device, queues=queues, interrupt_status=0)

    def serves(self, driver: Driver) -> None:
        """See Target."""
        port = self.device.ports[0]
        port.input = memoryview(b"")
        driver.send(0, writable=[16])
        if self.device.multiport:
            for _ in range(6):
                driver.send(CONTROL_RECEIVE, writable=[64])
            for event in (control.DEVICE_READY, control.PORT_READY, control.PORT_OPEN):
                driver.send(CONTROL_TRANSMIT, [Control(0, event, 1).to_bytes()])
            driver.kick(CONTROL_TRANSMIT)
            assert Control.parse(driver.used(CONTROL_RECEIVE)[0].data).event == control.PORT_ADD
        port.input = memoryview(b"in")
        with self.device.session():
            port.reading = False
            self.device.feed(port)
        assert [used.data for used in driver.used(0)] == [b"in"]
        driver.send(1, [b"out"])
        driver.kick(1)
        with self.device.session():
            assert port.take_exactly(port.backlog)[-3:] == b"out"


def run(data: bytes) -> None:
    """One script."""
    with lowered(console, MOST_CONTROL=_CONTROL):
        play(ConsoleTarget(), data)
