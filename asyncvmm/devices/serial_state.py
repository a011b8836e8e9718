"""What a 16550A serial port remembers, and the bits of its registers (PC16550D datasheet's names)."""

from __future__ import annotations

from typing import Final

import attrs

from asyncvmm.devices.checks import BYTE, at_most_bytes, flag, within
from asyncvmm.errors import ConfigError

FIFO_SIZE: Final = 16
BACKLOG_SIZE: Final = 4096
"""Bytes the host can have waiting behind the receive FIFO."""

OUTPUT_CAP: Final = 1 << 20
"""Bytes of output kept until the loop takes them; what comes beyond is dropped and counted."""

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IIR_MODEM_STATUS, IIR_NONE, IIR_THRE, IIR_DATA, IIR_LINE_STATUS, IIR_TIMEOUT = 0x00, 0x01, 0x02, 0x04, 0x06, 0x0C
IIR_FIFOS_ENABLED: Final = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_TRIGGER = 0x01, 0x02, 0xC0
LCR_DLAB: Final = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD, MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = (1 << bit for bit in range(8))


@attrs.frozen(kw_only=True)
class SerialState:
    """All that a serial port remembers. Construction refuses what no port can hold (ConfigError).

    ``fcr`` holds the enable and trigger bits only. ``msr_changes`` is MSR's low half, its high half follows from
    ``mcr``. ``thre_pending``: the transmitter-empty interrupt waits. ``burst``: THR writes that still belong to the
    transmit FIFO fill in progress. ``fifo`` is the receive FIFO, ``backlog`` what the host has waiting behind it,
    ``output`` what the loop has not taken yet, ``lost`` the bytes dropped after it. ``feed_cut``: the host was told
    that there is no room and waits.
    """

    ier: int = attrs.field(default=0, validator=within(0, 0x0F))
    fcr: int = attrs.field(default=0, validator=BYTE)
    lcr: int = attrs.field(default=0, validator=BYTE)
    mcr: int = attrs.field(default=0, validator=within(0, 0x1F))
    scr: int = attrs.field(default=0, validator=BYTE)
    dll: int = attrs.field(default=0x0C, validator=BYTE)
    dlm: int = attrs.field(default=0, validator=BYTE)
    msr_changes: int = attrs.field(default=0, validator=within(0, 0x0F))
    overrun: bool = attrs.field(default=False, validator=flag)
    thre_pending: bool = attrs.field(default=False, validator=flag)
    burst: int = attrs.field(default=0, validator=within(0, FIFO_SIZE - 1))
    fifo: bytes = attrs.field(default=b"", validator=at_most_bytes(FIFO_SIZE))
    backlog: bytes = attrs.field(default=b"", validator=at_most_bytes(BACKLOG_SIZE))
    feed_cut: bool = attrs.field(default=False, validator=flag)
    output: bytes = attrs.field(default=b"", validator=at_most_bytes(OUTPUT_CAP))
    lost: int = attrs.field(default=0, validator=within(0, (1 << 63) - 1))

    def __attrs_post_init__(self) -> None:
        if self.fcr & ~(FCR_ENABLE | FCR_TRIGGER) or (self.fcr and not self.fcr & FCR_ENABLE):
            raise ConfigError("saved fcr", expected="enable and trigger bits", found=f"{self.fcr:#x}")
        if len(self.fifo) > 1 and not self.fcr & FCR_ENABLE:
            raise ConfigError("saved fifo", expected="at most 1 byte with FIFOs off", found=f"{len(self.fifo)}")
        if self.thre_pending and not self.ier & IER_THRI:
            raise ConfigError("saved thre_pending", expected="THRI set in ier", found=f"{self.ier:#x}")
