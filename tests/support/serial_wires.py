"""A serial port with its wires in hand, and the names of its registers (PC16550D datasheet)."""

from __future__ import annotations

from itertools import count

from asyncvmm.devices.serial import Serial
from asyncvmm.devices.serial_state import SerialState

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DATA_READY, OVERRUN, EMPTY = 0x01, 0x02, 0x60


class Wires:
    """A serial port and what came out of it."""

    def __init__(self, state: SerialState | None = None) -> None:
        self.levels: list[bool] = []
        self.announced = 0
        self.rooms = 0
        ticks = count(1000)
        outputs = (self.levels.append, self._announce, self._room, ticks.__next__)
        self.port = Serial(*outputs) if state is None else Serial.from_state(state, *outputs)

    def _announce(self) -> None:
        self.announced += 1

    def _room(self) -> None:
        self.rooms += 1

    @property
    def level(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def send(self, data: bytes) -> None:
        for byte in data:
            self.port.write(THR, byte)

    def receive(self) -> bytes:
        """Read as a polling driver does: RBR as long as LSR shows data."""
        data = bytearray()
        while self.port.read(LSR) & DATA_READY:
            data.append(self.port.read(RBR))
        return bytes(data)
