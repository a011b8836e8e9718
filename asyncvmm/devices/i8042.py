"""What is left of the i8042 keyboard controller and port B: the reset line, and answers that end probing at once.

Facts: the IBM AT technical reference. Status and commands are at 0x64, data at 0x60. Bit 0 of the controller's output
port is the CPU's reset line, active low; commands 0xf0 to 0xff pulse those of its low four bits that are 0 in the
command, and 0xd1 writes it. Port B (0x61) has the timer 2 gate and the speaker in bits 0 and 1, check enables in 2 and
3, the refresh clock in bit 4 and timer 2's output in bit 5.

What Linux makes of it: its driver first empties the data register; if that never reads empty (16 tries), there is no
controller. A status without OBF would have it wait half a second, 10,000 reads, for the answer to each command. Before
it resets by this controller it waits for IBF to clear. So the status is OBF, never IBF. The loop in which it waits for
timer 2's output ends at once, too, and the calibration that it belongs to is then thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from asyncvmm.devices.checks import flag, within

DATA: Final = 0
PORT_B: Final = 1
COMMAND: Final = 4
STATUS: Final = 4
PORT_COUNT: Final = 5
"""From 0x60: data, port B, two that do not exist, command and status (0x64)."""

STATUS_OBF: Final = 0x01
COMMAND_WRITE_OUTPUT_PORT: Final = 0xD1
COMMAND_PULSE: Final = 0xF0
OUTPUT_PORT_RUN: Final = 0x01

_PORTS: Final = (DATA, PORT_B, COMMAND)
_PORT_B_CONTROLS: Final = 0x0F
_PORT_B_REFRESH: Final = 0x10
_PORT_B_TIMER2_OUT: Final = 0x20


@attrs.frozen(kw_only=True)
class I8042State:
    """``port_b``: its four control bits and the refresh clock. ``output_port_next``: 0xd1 awaits its data byte."""

    port_b: int = attrs.field(default=0, validator=within(0, _PORT_B_CONTROLS | _PORT_B_REFRESH))
    output_port_next: bool = attrs.field(default=False, validator=flag)


class I8042:
    """Ports 0x60 to 0x64. ``reset`` is called when the guest pulls the CPU's reset line.

    ``read_count`` and ``write_count`` count accesses, ``missed_read_count`` and ``missed_write_count`` those of ports
    that do not exist, ``reset_count`` the pulls, since this object was made.
    """

    __slots__ = (
        "_output_port_next",
        "_port_b",
        "_reset",
        "missed_read_count",
        "missed_write_count",
        "read_count",
        "reset_count",
        "write_count",
    )

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self.read_count = self.write_count = self.reset_count = 0
        self.missed_read_count = self.missed_write_count = 0
        self._port_b = 0
        self._output_port_next = False

    @classmethod
    def from_state(cls, state: I8042State, reset: Callable[[], None]) -> I8042:
        """The controller that ``state()`` described."""
        controller = cls(reset)
        controller._port_b = state.port_b
        controller._output_port_next = state.output_port_next
        return controller

    def state(self) -> I8042State:
        """All that this controller remembers."""
        return I8042State(port_b=self._port_b, output_port_next=self._output_port_next)

    def read(self, offset: int) -> int:
        """The guest reads port 0x60 + ``offset``."""
        if offset not in _PORTS:
            self.missed_read_count += 1
            return 0xFF
        self.read_count += 1
        if offset == STATUS:
            return STATUS_OBF
        if offset == DATA:
            return 0
        self._port_b ^= _PORT_B_REFRESH  # some delay loops count its changes
        return self._port_b | _PORT_B_TIMER2_OUT

    def write(self, offset: int, value: int) -> None:
        """The guest writes ``value`` to port 0x60 + ``offset``."""
        if offset not in _PORTS:
            self.missed_write_count += 1
            return
        self.write_count += 1
        if offset == COMMAND:
            self._command(value)
        elif offset == DATA:
            self._data(value)
        else:
            self._port_b = self._port_b & _PORT_B_REFRESH | value & _PORT_B_CONTROLS

    def _command(self, value: int) -> None:
        self._output_port_next = value == COMMAND_WRITE_OUTPUT_PORT
        if value >= COMMAND_PULSE and not value & OUTPUT_PORT_RUN:
            self._pull_reset()

    def _data(self, value: int) -> None:
        if self._output_port_next and not value & OUTPUT_PORT_RUN:
            self._pull_reset()
        self._output_port_next = False

    def _pull_reset(self) -> None:
        self.reset_count += 1
        self._reset()
