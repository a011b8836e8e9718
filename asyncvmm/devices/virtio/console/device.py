"""The console device (virtio 1.2, section 5.3): port 0, which is hvc0 in the guest, and named ports beside it.

Bytes from the guest are copied once, out of its memory, and handed on as they are. A reader that is slow holds the
guest back: its buffers stay in the queue. Bytes for the guest go straight into its buffers.

With named ports MULTIPORT is offered: the driver asks for its ports by control messages, and both sides say when they
open or close one. Without, port 0 is open as long as there is a driver.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from asyncvmm.device_config import ConsoleConfig
from asyncvmm.devices.checks import boolean, entry, hex_bytes, integer, shown
from asyncvmm.devices.virtio import ids
from asyncvmm.devices.virtio.console import control
from asyncvmm.devices.virtio.console.control import Control
from asyncvmm.devices.virtio.console.port import BACKLOG_BYTES, ConsolePort
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.queue import Chain, Queue
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import ConsoleMetrics

VIRTIO_CONSOLE_F_MULTIPORT: Final = 1

CONSOLE_NAME: Final = "console"
"""Port 0's name."""

CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
DATA_QUEUE_SIZE: Final = 128
CONTROL_QUEUE_SIZE: Final = 32
MAX_NR_PORTS: Final = 4
"""Where the number of ports stands in the configuration space, behind cols and rows."""

MOST_CHAINS: Final = 32
"""Buffers handled in one go."""

MOST_BYTES: Final = 1 << 20
"""Bytes taken from the guest in one go."""

MOST_CONTROL: Final = 64
"""Messages that may wait for the driver before its own have to wait."""


class VirtioConsole(VirtioDevice):
    """One console. ``ports``: port 0, then the named ones."""

    device_id: ClassVar[int] = ids.CONSOLE
    metrics: ConsoleMetrics

    def __init__(self, config: ConsoleConfig, metrics: ConsoleMetrics, *, backlog_bytes: int = BACKLOG_BYTES) -> None:
        names = config.ports
        self.ports = [ConsolePort(0, CONSOLE_NAME, is_console=True, limit=backlog_bytes)]
        self.ports += [ConsolePort(number, name, limit=backlog_bytes) for number, name in enumerate(names, 1)]
        sizes = [DATA_QUEUE_SIZE, DATA_QUEUE_SIZE]
        if names:
            sizes += [CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE, *[DATA_QUEUE_SIZE] * (2 * len(names))]
        space = bytes(MAX_NR_PORTS) + len(self.ports).to_bytes(4, "little") + bytes(4)
        super().__init__(tuple(sizes), bool(names) << VIRTIO_CONSOLE_F_MULTIPORT, space, metrics)
        self._messages: deque[bytes] = deque()

    @property
    def multiport(self) -> bool:
        """Whether there are control messages."""
        return self.has(VIRTIO_CONSOLE_F_MULTIPORT)

    # -- what a port's user does, within a session -------------------------------------------------------------------

    def open_port(self, port: ConsolePort) -> None:
        """Somebody on the host has the port from now on. The driver hears of it, if there is one."""
        port.host_open = True
        self._tell_host_open(port)

    def close_port(self, port: ConsolePort) -> None:
        """Nobody has it any more; what was not read is dropped, and what the guest was still to get."""
        port.host_open = port.reading = False
        port.input = memoryview(b"")
        self.metrics.tx_lost_bytes += port.discard()
        self._tell_host_open(port)
        for _ in range(DATA_QUEUE_SIZE // MOST_CHAINS):
            self.take_more(port)

    def take_more(self, port: ConsolePort) -> None:
        """A reader has made room: go on where the guest was held back."""
        if port.throttled and self.running:
            self._take_output(port)

    def feed(self, port: ConsolePort) -> bool:
        """Pass ``port.input`` to the guest as far as it has buffers; True if it has more than fit into one go."""
        queue = self.queues[_receive_queue(port.number)]
        if not port.guest_open:
            return False
        for _ in queue.turn(MOST_CHAINS):
            if not port.input:
                return False
            chain = queue.pop()
            if chain is None:
                self.metrics.no_rx_avail_buffer += 1
                return False
            self._fill(port, queue, chain)
        return bool(port.input) and queue.available() > 0

    def resize(self, columns: int, rows: int) -> None:
        """Tell the driver how large hvc0's window is."""
        if self.multiport and self.ports[0].ready:
            self._note(control.resize(0, columns, rows))
            self._deliver()

    # -- what the driver does ----------------------------------------------------------------------------------------

    def activate(self) -> None:
        """Without control messages there is nobody to open port 0."""
        if not self.multiport:
            self.ports[0].ready = self.ports[0].guest_open = self.ports[0].was_open = True

    def reset(self) -> None:
        """The driver is gone, and its half of every port with it."""
        self._messages.clear()
        for port in self.ports:
            port.forget_driver()
            port.changed()

    def process(self, index: int) -> bool:
        """A bounded number of buffers. Raises GuestFault."""
        if index in (CONTROL_RECEIVE, CONTROL_TRANSMIT):
            return self.multiport and self._process_control()
        port = self._port_of(index)
        if port is None:
            return False
        return self._process_receive(port) if index % 2 == 0 else self._process_transmit(port)

    def _port_of(self, index: int) -> ConsolePort | None:
        number = 0 if index < CONTROL_RECEIVE else index // 2 - 1
        return self.ports[number] if number == 0 or self.multiport else None

    def _process_receive(self, port: ConsolePort) -> bool:
        self.metrics.rx_queue_event_count += 1
        more = bool(port.input) and self.feed(port)
        port.changed()
        return more

    def _process_transmit(self, port: ConsolePort) -> bool:
        self.metrics.tx_queue_event_count += 1
        more = self._take_output(port)
        port.changed()
        return more

    def _fill(self, port: ConsolePort, queue: Queue, chain: Chain) -> None:
        written = chain.write(port.input)
        queue.push(chain, written)
        port.input = port.input[written:]
        if written:
            self.metrics.rx_count += 1
            self.metrics.rx_bytes_count += written
        else:
            self.metrics.rx_fails += 1

    # -- bytes from the guest ------------------------------------------------------------------------------------------

    def _take_output(self, port: ConsolePort) -> bool:
        queue = self.queues[_receive_queue(port.number) + 1]
        left = MOST_BYTES
        for _ in queue.turn(MOST_CHAINS):
            if port.room <= 0:
                self._throttle(port, queue)
                return False
            chain = self._current(port, queue)
            if chain is None:
                port.throttled = False
                return False
            left -= self._take(port, queue, chain, min(left, port.room))
            if left <= 0:
                return True
        return queue.available() > 0

    def _throttle(self, port: ConsolePort, queue: Queue) -> None:
        if not port.throttled and (port.chain is not None or queue.available()):
            port.throttled = True
            self.metrics.tx_throttled += 1

    def _current(self, port: ConsolePort, queue: Queue) -> Chain | None:
        """The buffer that was read in part, else the next one."""
        if port.chain is None or not queue.is_current(port.chain):
            if port.chain is not None:
                port.offset = 0
            port.chain = queue.pop()
        return port.chain

    def _take(self, port: ConsolePort, queue: Queue, chain: Chain, most: int) -> int:
        """Read on in a buffer, and give it back once it is read whole. Returns the bytes read."""
        data = chain.read(most, port.offset)
        if data:
            self.metrics.tx_bytes_count += len(data)
            self.metrics.tx_lost_bytes += port.append(data)
            port.offset += len(data)
        if port.offset >= chain.readable_size:
            queue.push(chain, 0)
            port.chain, port.offset = None, 0
            if data:
                self.metrics.tx_count += 1
            else:
                self.metrics.tx_fails += 1
        return len(data)

    # -- control messages ----------------------------------------------------------------------------------------------

    def _process_control(self) -> bool:
        self.metrics.control_queue_event_count += 1
        queue = self.queues[CONTROL_TRANSMIT]
        self._deliver()
        for _ in queue.turn(MOST_CHAINS):
            chain = queue.pop() if len(self._messages) < MOST_CONTROL else None
            if chain is None:
                break
            self._hear(chain.read(control.MOST_BYTES))
            queue.push(chain, 0)
        return self._deliver() or (queue.available() > 0 and len(self._messages) < MOST_CONTROL)

    def _hear(self, data: bytes) -> None:
        try:
            message = Control.parse(data)
            self._handle(message)
        except ValueError:
            self.metrics.control_fails += 1
        else:
            self.metrics.control_count += 1

    def _handle(self, message: Control) -> None:
        """Raises ValueError for what makes no sense."""
        if message.event == control.DEVICE_READY:
            if message.value != 1:
                raise ValueError("the driver has no use for the device")
            for port in self.ports:
                self._send(Control(port.number, control.PORT_ADD))
            return
        if message.id >= len(self.ports):
            raise ValueError(f"port {message.id} of {len(self.ports)}")
        port = self.ports[message.id]
        if message.event == control.PORT_READY and message.value == 1:
            self._introduce(port)
        elif message.event == control.PORT_OPEN:
            self._guest_opens(port, bool(message.value))
        else:
            raise ValueError(f"event {message.event} with value {message.value}")

    def _introduce(self, port: ConsolePort) -> None:
        """The driver has made room for a port: say what it is."""
        port.ready = True
        if port.is_console:
            self._send(Control(port.number, control.CONSOLE_PORT, 1))
        else:
            self._send(Control(port.number, control.PORT_NAME, 1, port.name.encode()))
        if port.host_open or port.is_console:
            self._send(Control(port.number, control.PORT_OPEN, 1))

    def _guest_opens(self, port: ConsolePort, is_open: bool) -> None:
        if is_open and not port.guest_open:
            self.metrics.ports_opened += 1
        elif port.guest_open and not is_open:
            self.metrics.ports_closed += 1
        port.guest_open = is_open
        port.was_open |= is_open
        if port.input:
            self.feed(port)
        port.changed()

    def _tell_host_open(self, port: ConsolePort) -> None:
        self._note_host_open(port)
        self._deliver()

    def _note_host_open(self, port: ConsolePort) -> None:
        if port.ready and self.multiport and not port.is_console:
            self._note(Control(port.number, control.PORT_OPEN, int(port.host_open)))

    def _note(self, message: Control) -> None:
        """Only the newest of its kind counts, if the driver has not heard of the ones before."""
        data = message.to_bytes()
        same = data[: control.SUBJECT_BYTES]
        self._messages = deque(entry for entry in self._messages if not entry.startswith(same))
        self._messages.append(data)

    def _send(self, message: Control) -> None:
        self._messages.append(message.to_bytes())

    def _deliver(self) -> bool:
        """Give the driver its messages; True if there are both messages and buffers left."""
        if not self.multiport or not self.running:
            return False
        queue = self.queues[CONTROL_RECEIVE]
        for _ in queue.turn(MOST_CHAINS):
            chain = queue.pop() if self._messages else None
            if chain is None:
                return False
            if chain.writable_size < len(self._messages[0]):
                self.metrics.control_fails += 1
                queue.push(chain, 0)
            else:
                queue.push(chain, chain.write(self._messages.popleft()))
        return bool(self._messages) and queue.available() > 0

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the driver and the device know of each other. Bytes that the host has taken are the host's affair."""
        return {
            "messages": [message.hex() for message in self._messages],
            "ports": [
                {
                    "name": port.name,
                    "ready": port.ready,
                    "guest_open": port.guest_open,
                    "was_open": port.was_open,
                    "offset": port.offset,
                }
                for port in self.ports
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError."""
        messages, ports = entry(state, "messages"), entry(state, "ports")
        names = [port.name for port in self.ports]
        if not isinstance(ports, list) or len(ports) != len(names) or [_name(port) for port in ports] != names:
            raise ConfigError("saved ports", expected=names, found=shown(ports))
        if not isinstance(messages, list) or len(messages) > MOST_CONTROL + 2 * MOST_CHAINS:
            raise ConfigError("saved messages", expected=f"at most {MOST_CONTROL}", found=shown(messages))
        self._messages = deque(hex_bytes({"message": data}, "message", control.MOST_BYTES) for data in messages)
        for port, saved in zip(self.ports, ports, strict=True):
            port.ready, port.guest_open = boolean(saved, "ready"), boolean(saved, "guest_open")
            port.was_open = boolean(saved, "was_open")
            port.offset = integer(saved, "offset", (1 << 32) - 1)
        for port in self.ports:
            self._note_host_open(port)


def _name(port: object) -> object:
    return port.get("name") if isinstance(port, Mapping) else None


def _receive_queue(number: int) -> int:
    """A port's receive queue; its transmit queue is the next one."""
    return 2 * number + 2 if number else 0
