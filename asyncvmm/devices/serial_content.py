"""What a 16550A serial port holds, registers and buffers: made of a SerialState, described as one, and still.

What it does with them is in serial.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable

from asyncvmm.devices.serial_modem import modem_inputs
from asyncvmm.devices.serial_output import OutputBuffer
from asyncvmm.devices.serial_state import LSR_DR, LSR_OE, LSR_TEMT, LSR_THRE, SerialState


class SerialContent(OutputBuffer):
    """The content of a port, which derives from it. output_pending, clock: see OutputBuffer.

    ``received`` counts the bytes accepted from the host since this object was made. For metrics, since then:
    ``read_count`` bytes the guest read, ``missed_read_count`` reads of an empty RBR, ``error_count`` overruns.
    """

    __slots__ = (
        "_backlog",
        "_burst",
        "_dll",
        "_dlm",
        "_fcr",
        "_feed_cut",
        "_fifo",
        "_ier",
        "_lcr",
        "_lsr",
        "_lsr_plain",
        "_mcr",
        "_msr",
        "_scr",
        "_thre_pending",
        "error_count",
        "missed_read_count",
        "read_count",
        "received",
    )

    def __init__(self, output_pending: Callable[[], None], clock: Callable[[], int]) -> None:
        super().__init__(output_pending, clock)
        self.received = self.error_count = 0
        self.read_count = self.missed_read_count = 0
        self._load(SerialState())

    def _load(self, state: SerialState) -> None:
        self._ier, self._fcr, self._lcr, self._mcr = state.ier, state.fcr, state.lcr, state.mcr
        self._scr, self._dll, self._dlm = state.scr, state.dll, state.dlm
        self._lsr = LSR_THRE | LSR_TEMT | (LSR_OE if state.overrun else 0) | (LSR_DR if state.fifo else 0)
        self._msr = modem_inputs(state.mcr) | state.msr_changes
        self._thre_pending, self._burst = state.thre_pending, state.burst
        self._lsr_plain = not state.overrun and not state.burst
        self._fifo, self._backlog = deque(state.fifo), deque(state.backlog)
        self._feed_cut = state.feed_cut
        self._load_output(state.output, state.lost)
        self._select_registers()

    def state(self) -> SerialState:
        """All that this port remembers."""
        return SerialState(
            ier=self._ier,
            fcr=self._fcr,
            lcr=self._lcr,
            mcr=self._mcr,
            scr=self._scr,
            dll=self._dll,
            dlm=self._dlm,
            msr_changes=self._msr & 0x0F,
            overrun=bool(self._lsr & LSR_OE),
            thre_pending=self._thre_pending,
            burst=self._burst,
            fifo=bytes(self._fifo),
            backlog=bytes(self._backlog),
            feed_cut=self._feed_cut,
            output=bytes(self._output),
            lost=self._lost,
        )

    @abstractmethod
    def _select_registers(self) -> None:
        """Have RBR, THR and IER, or the divisor's latches, in their places, as LCR says."""
