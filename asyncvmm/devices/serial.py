"""A 16550A serial port as a state machine: registers in, bytes and one interrupt line out.

Facts: National Semiconductor PC16550D datasheet (register names, interrupt priorities and what clears each of them,
FIFO and loopback rules); what Linux's 8250 driver probes for. Where this port has a choice:

- Transmission takes no time. LSR always shows THRE and TEMT; the transmit FIFO is never seen with anything in it.
- Every received byte interrupts at once. Below the trigger level IIR calls it a character timeout (0xC), as if the
  timeout had passed; at or above it, received data (0x4).
- OUT2 does not gate the interrupt line. On a PC it drives the buffer between the chip and the ISA bus, there because
  two cards may share a line; here each port has its own. QEMU does the same: a guest which runs there runs here.
- A break (LCR bit 6) is ignored, and so is the baud rate.

Threads: the caller holds the port's lock around every call. The four callables are called with it held, so they must be
quick and must not call back into the port.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from asyncvmm.devices.serial_content import SerialContent
from asyncvmm.devices.serial_modem import modem_status
from asyncvmm.devices.serial_output import NEWLINE, URGENT_BYTES
from asyncvmm.devices.serial_state import (
    BACKLOG_SIZE,
    FCR_CLEAR_RX,
    FCR_ENABLE,
    FCR_TRIGGER,
    FIFO_SIZE,
    IER_MSI,
    IER_RDI,
    IER_RLSI,
    IER_THRI,
    IIR_DATA,
    IIR_FIFOS_ENABLED,
    IIR_LINE_STATUS,
    IIR_MODEM_STATUS,
    IIR_NONE,
    IIR_THRE,
    IIR_TIMEOUT,
    LCR_DLAB,
    LSR_DR,
    LSR_OE,
    MCR_LOOP,
    OUTPUT_CAP,
    SerialState,
)

PORT_COUNT: Final = 8
"""I/O ports a 16550A occupies."""

RBR: Final = 0
THR: Final = 0
LSR: Final = 5

_TRIGGER_LEVELS: Final = (1, 4, 8, 14)


class Serial(SerialContent):
    """One 16550A.

    interrupt: told the line's new level, only when it changes. output_pending, clock: see OutputBuffer. room: told when
    the backlog has emptied after a ``feed`` that did not take all.
    """

    __slots__ = ("_interrupt", "_level", "_readers", "_room", "_writers")

    def __init__(
        self,
        interrupt: Callable[[bool], None],
        output_pending: Callable[[], None],
        room: Callable[[], None],
        clock: Callable[[], int],
    ) -> None:
        self._interrupt, self._room = interrupt, room
        self._level = False
        super().__init__(output_pending, clock)

    @classmethod
    def from_state(
        cls,
        state: SerialState,
        interrupt: Callable[[bool], None],
        output_pending: Callable[[], None],
        room: Callable[[], None],
        clock: Callable[[], int],
    ) -> Serial:
        """The port that ``state()`` described. A line that was high and output that was pending are told at once.

        Newlines in the pending output get the present time: the saved one was another host's clock.
        """
        port = cls(interrupt, output_pending, room, clock)
        port._load(state)
        port._refill()
        port._update_line()
        if port._output:
            output_pending()
        return port

    # -- the guest's side ----------------------------------------------------------------------------------------

    def read(self, offset: int) -> int:
        """The guest reads the register at ``offset`` (0..7)."""
        if offset == LSR and self._lsr_plain:  # polled before every byte: no second call
            return self._lsr
        return self._readers[offset & 7](self)

    def write(self, offset: int, value: int) -> None:
        """The guest writes ``value`` (0..255) to the register at ``offset`` (0..7)."""
        if offset == THR and value != NEWLINE and len(self._output) < self._plain_below:
            self._output.append(value)  # nothing to tell anybody: no second call
        else:
            self._writers[offset & 7](self, value)

    def _select_registers(self) -> None:
        dlab = self._lcr & LCR_DLAB
        self._readers = _READERS_DLAB if dlab else _READERS
        self._writers = _WRITERS_DLAB if dlab else _WRITERS
        self._find_plain_writes()

    def _find_plain_writes(self) -> None:
        """Output length below which a THR write only appends: no interrupt, no loopback, no one to tell."""
        if not self._output or self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._ier & IER_THRI:
            self._plain_below = 0
        else:
            self._plain_below = OUTPUT_CAP if self.urgent else URGENT_BYTES - 1

    def _read_rbr(self) -> int:
        if not self._fifo:
            self.missed_read_count += 1
            return 0
        self.read_count += 1
        value = self._fifo.popleft()
        self._refill()
        self._update_line()
        return value

    def _write_thr(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._receive_looped(value)
        else:
            self._transmit(value)
        if self._ier & IER_THRI:
            self._transmitter_emptied()
        self._update_line()

    def _read_dll(self) -> int:
        return self._dll

    def _write_dll(self, value: int) -> None:
        self._dll = value

    def _read_dlm(self) -> int:
        return self._dlm

    def _write_dlm(self, value: int) -> None:
        self._dlm = value

    def _read_ier(self) -> int:
        return self._ier

    def _write_ier(self, value: int) -> None:
        changed = self._ier ^ value
        self._ier = value & 0x0F
        if changed & IER_THRI:  # enabling it while THR is empty, as ours always is, interrupts at once
            self._thre_pending = bool(value & IER_THRI)
            self._burst = 0
        self._find_plain_writes()
        self._update_line()

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._burst = 0
            self._update_line()
        return cause | (IIR_FIFOS_ENABLED if self._fcr & FCR_ENABLE else 0)

    def _write_fcr(self, value: int) -> None:
        switched = (self._fcr ^ value) & FCR_ENABLE
        self._fcr = value & (FCR_ENABLE | FCR_TRIGGER) if value & FCR_ENABLE else 0
        if switched or (value & FCR_ENABLE and value & FCR_CLEAR_RX):
            self._fifo.clear()
        self._burst = 0
        self._refill()
        self._update_line()

    def _read_lcr(self) -> int:
        return self._lcr

    def _write_lcr(self, value: int) -> None:
        self._lcr = value
        self._select_registers()

    def _read_mcr(self) -> int:
        return self._mcr

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        self._msr = modem_status(self._msr, self._mcr)
        self._find_plain_writes()
        self._refill()
        self._update_line()

    def _read_lsr(self) -> int:
        value = self._lsr
        self._lsr = value & ~LSR_OE
        self._burst = 0
        self._lsr_plain = True
        self._update_line()
        return value

    def _read_msr(self) -> int:
        value = self._msr
        self._msr = value & 0xF0
        self._update_line()
        return value

    def _read_scr(self) -> int:
        return self._scr

    def _write_scr(self, value: int) -> None:
        self._scr = value

    def _write_nothing(self, value: int) -> None:
        """LSR and MSR: the datasheet leaves writes to factory tests."""

    # -- inside ----------------------------------------------------------------------------------------------------

    def _depth(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _cause(self) -> int:
        """What IIR shows in its low four bits: the pending interrupt of the highest priority."""
        ier = self._ier
        if ier & IER_RLSI and self._lsr & LSR_OE:
            return IIR_LINE_STATUS
        if ier & IER_RDI and self._fifo:
            fifos_on = self._fcr & FCR_ENABLE
            return IIR_TIMEOUT if fifos_on and len(self._fifo) < _TRIGGER_LEVELS[self._fcr >> 6] else IIR_DATA
        if self._thre_pending:
            return IIR_THRE
        if ier & IER_MSI and self._msr & 0x0F:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_line(self) -> None:
        level = self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._interrupt(level)

    def _transmitter_emptied(self) -> None:
        """A THR write clears the THRE interrupt, and its transmission, here at once, sets it again: an edge.

        With FIFOs on, writes that follow each other directly are one fill of the FIFO, which empties once. Without
        this a driver's burst of 16 would toggle the line 16 times.
        """
        if self._burst == 0:
            self._thre_pending = False
            self._update_line()
            self._burst = self._depth()
        self._burst -= 1
        self._lsr_plain = self._lsr_plain and not self._burst  # an LSR read ends the burst
        self._thre_pending = True

    def _receive_looped(self, value: int) -> None:
        if len(self._fifo) >= self._depth():
            self._lsr |= LSR_OE
            self._lsr_plain = False
            self.error_count += 1
            if self._fcr & FCR_ENABLE:
                return  # a full FIFO keeps what it has; RBR alone is overwritten
            self._fifo.clear()
        self._fifo.append(value)
        self._lsr |= LSR_DR

    def _refill(self) -> None:
        """Move the backlog up into the FIFO (in loopback the line in is cut off), and show in LSR what there is."""
        fifo, backlog = self._fifo, self._backlog
        if backlog and not self._mcr & MCR_LOOP:
            while backlog and len(fifo) < self._depth():
                fifo.append(backlog.popleft())
        self._lsr = self._lsr | LSR_DR if fifo else self._lsr & ~LSR_DR
        if self._feed_cut and not backlog:
            self._feed_cut = False
            self._room()

    # -- for a run loop that answers polled accesses itself ----------------------------------------------------------

    @property
    def constant_lsr(self) -> int | None:
        """What every LSR read gives until the next call changes it; None if a read itself changes something."""
        return self._lsr if self._lsr_plain else None

    @property
    def posts_writes(self) -> bool:
        """Whether THR writes do nothing but add to the output, so that they may come later, together, by ``post``."""
        return not (self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or self._ier & IER_THRI)

    # -- the loop's side -------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> int:
        """Bytes for the guest. Returns how many were taken; if not all, ``room`` is called once there is room."""
        taken = min(len(data), BACKLOG_SIZE - len(self._backlog))
        self._backlog.extend(data[:taken])
        self.received += taken
        self._feed_cut = self._feed_cut or taken < len(data)
        self._refill()
        self._update_line()
        return taken


_READERS: Final[tuple[Callable[[Serial], int], ...]] = (
    Serial._read_rbr,
    Serial._read_ier,
    Serial._read_iir,
    Serial._read_lcr,
    Serial._read_mcr,
    Serial._read_lsr,
    Serial._read_msr,
    Serial._read_scr,
)
_WRITERS: Final[tuple[Callable[[Serial, int], None], ...]] = (
    Serial._write_thr,
    Serial._write_ier,
    Serial._write_fcr,
    Serial._write_lcr,
    Serial._write_mcr,
    Serial._write_nothing,
    Serial._write_nothing,
    Serial._write_scr,
)
_READERS_DLAB: Final = (Serial._read_dll, Serial._read_dlm, *_READERS[2:])
_WRITERS_DLAB: Final = (Serial._write_dll, Serial._write_dlm, *_WRITERS[2:])
