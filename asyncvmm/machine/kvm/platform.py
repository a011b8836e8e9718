"""The board: which devices a KVM machine has, at which ports, behind which locks and interrupt lines.

Addresses and GSIs are those of ``x86.layout``; what a device causes leaves through ``Outlets``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import attrs

from asyncvmm.bus import Bus, ByteDevice
from asyncvmm.devices.acpi_pm import AcpiPm
from asyncvmm.devices.debug_exit import DebugExit
from asyncvmm.devices.ged import Ged, GedState
from asyncvmm.devices.i8042 import I8042, I8042State
from asyncvmm.devices.rtc import Rtc, RtcState
from asyncvmm.devices.serial import Serial
from asyncvmm.devices.serial_state import SerialState
from asyncvmm.effects import Port
from asyncvmm.machine.kvm.fastpath.binding import Fastpath
from asyncvmm.machine.kvm.fastpath.serial import CONSOLE_SLOTS, CONTROL_SLOTS, PolledSerial, Slots
from asyncvmm.machine.kvm.interleave import Taken
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.x86 import layout


@attrs.frozen(kw_only=True)
class Outlets:
    """Where the board's effects go. All are called on a vCPU thread with the device's lock held.

    irq: GSI and its new level. output_pending, room: which port. The others: the guest is through.
    """

    irq: Callable[[int, bool], None]
    output_pending: Callable[[Port], None]
    room: Callable[[Port], None]
    shutdown: Callable[[], None]
    reset: Callable[[], None]
    debug_exit: Callable[[int], None]


class SerialPort:
    """A 16550A with its lock, as the loop's side uses it."""

    def __init__(
        self, name: Port, gsi: int, outlets: Outlets, clock: Callable[[], int], state: SerialState | None = None
    ) -> None:
        """``state``: what it was when it was saved; its line is as high or low already, and nothing is told of it."""
        self.name: Port = name
        self.gsi = gsi
        self.lock = threading.Lock()
        self.polled: PolledSerial | None = None
        self.is_high = False
        self._outlets: Outlets | None = None
        self.device = Serial.from_state(
            state or SerialState(),
            interrupt=self._set_line,
            output_pending=self.announce_output,
            room=lambda: outlets.room(name),
            clock=clock,
        )
        self._outlets = outlets

    def announce_output(self) -> None:
        """Say that there is output to take."""
        if self._outlets is not None:
            self._outlets.output_pending(self.name)

    def _set_line(self, level: bool) -> None:
        self.is_high = level
        if self._outlets is not None:
            if level and self.polled is not None:
                self.polled.publish()  # the handler may look at LSR before the call that raises the line has ended
            self._outlets.irq(self.gsi, level)

    @property
    def on_bus(self) -> ByteDevice:
        """What the bus is to see."""
        return self.polled or self.device

    def poll_through(self, fastpath: Fastpath, first_port: int, slots: Slots) -> None:
        """Let the native run loop answer this port's polled accesses."""
        self.polled = PolledSerial(self.device, fastpath, first_port, slots)

    def transmitted(self) -> int:
        """Bytes the guest has written so far."""
        with self.lock:
            self._collect()
            return self.device.transmitted

    def take(self) -> Taken:
        """The pending output."""
        with self.lock:
            self._collect()
            first = self.device.taken
            return Taken(*self.device.take_output(), first=first)

    def state(self) -> SerialState:
        """All that it remembers, output that is still with the native run loop included. The lock is held."""
        self._collect()
        return self.device.state()

    def feed(self, data: bytes) -> int:
        """Bytes for the guest; returns how many the port took."""
        with self.lock:
            taken = self.device.feed(data)
            if self.polled is not None:
                self.polled.publish()
            return taken

    def _collect(self) -> None:
        if self.polled is not None:
            self.polled.collect()


class Board:
    """All devices of one VM on one bus.

    ``control_marks`` holds, for each newline of the control line's untaken output, how many bytes the console had sent
    by then: so the loop can hand out both ports' bytes in the order in which the guest wrote them.
    """

    def __init__(self, outlets: Outlets, fastpath: Fastpath | None, state: BoardState | None = None) -> None:
        """``state``: of the board that was saved. Its lines stand at their levels already, no edge is made of them; and
        its output is not announced before ``announce_output``, for which somebody must be there to hear it."""
        self.bus = Bus()
        self.control_marks: list[int] = []
        console, control = (state.console, state.control) if state else (None, None)
        self.console = SerialPort("console", layout.COM1_GSI, outlets, time.monotonic_ns, console)
        self.control = SerialPort("control", layout.COM2_GSI, outlets, self._mark_control_newline, control)
        self.ged_lock = threading.Lock()
        self._pulses_ged = state is None
        self.ged = Ged.from_state(state.ged if state else GedState(), lambda level: self._pulse_ged(outlets, level))
        self._pulses_ged = True
        self.i8042 = I8042.from_state(state.i8042 if state else I8042State(), outlets.reset)
        self.rtc = Rtc.from_state(state.rtc if state else RtcState(), time.time)
        if state is not None:
            self.control_marks = list(state.control_marks)
        if fastpath is not None:
            self.console.poll_through(fastpath, layout.COM1_PORT, CONSOLE_SLOTS)
            self.control.poll_through(fastpath, layout.COM2_PORT, CONTROL_SLOTS)
        self._attach(outlets)

    def announce_output(self) -> None:
        """Say of each port that has output, as a restored one may, that it is to be taken."""
        for port in (self.console, self.control):
            if port.transmitted():
                port.announce_output()

    def state(self) -> BoardState:
        """All that the devices remember, while no vCPU runs; the loop may go on feeding and taking."""
        with self.control.lock, self.console.lock, self.ged_lock:
            first = self.console.device.taken
            return BoardState(
                console=self.console.state(),
                control=self.control.state(),
                control_marks=[max(0, mark - first) for mark in self.control_marks],
                i8042=self.i8042.state(),
                rtc=self.rtc.state(),
                ged=self.ged.state(),
                high=[port.gsi for port in (self.console, self.control) if port.is_high],
            )

    def change_generation(self, write: Callable[[int, bytes], None]) -> None:
        """This VM is another one than that which was saved: have a guest that heeds it see a new VM generation ID.

        ``write`` puts bytes at an address of guest memory.
        """
        with self.ged_lock:
            if self.ged.heeds_generation:
                write(layout.VM_GENERATION_ADDRESS, os.urandom(layout.VM_GENERATION_BYTES))
                self.ged.announce_generation()

    def press_power_button(self) -> None:
        """Set the GED's event and pulse its line."""
        with self.ged_lock:
            self.ged.press_power_button()

    def _pulse_ged(self, outlets: Outlets, level: bool) -> None:
        if self._pulses_ged:
            outlets.irq(layout.ACPI_EVENT_GSI, level)

    def _attach(self, outlets: Outlets) -> None:
        attach = self.bus.attach
        power = AcpiPm(shutdown=outlets.shutdown, reset=outlets.reset)
        attach("com1", layout.COM1_PORT, layout.SERIAL_PORT_SIZE, self.console.on_bus, self.console.lock)
        attach("com2", layout.COM2_PORT, layout.SERIAL_PORT_SIZE, self.control.on_bus, self.control.lock)
        attach("i8042", layout.I8042_DATA_PORT, 5, self.i8042, threading.Lock())
        attach("rtc", layout.RTC_INDEX_PORT, 2, self.rtc, threading.Lock())
        attach("debug-exit", layout.DEBUG_EXIT_PORT, 1, DebugExit(outlets.debug_exit), threading.Lock())
        attach("acpi-pm", layout.ACPI_SLEEP_CONTROL_PORT, 3, power, threading.Lock())
        attach("ged", layout.ACPI_EVENT_PORT, 1, self.ged, self.ged_lock)

    def _mark_control_newline(self) -> int:
        self.control_marks.append(self.console.transmitted())
        return time.monotonic_ns()
