"""The modem side of a 16550A (PC16550D datasheet, MCR and MSR): what its inputs show, and what counts as a change."""

from __future__ import annotations

from typing import Final

from asyncvmm.devices.serial_state import (
    MCR_DTR,
    MCR_LOOP,
    MCR_OUT1,
    MCR_OUT2,
    MCR_RTS,
    MSR_CTS,
    MSR_DCD,
    MSR_DSR,
    MSR_RI,
)

_CABLE_PLUGGED_IN: Final = MSR_CTS | MSR_DSR | MSR_DCD
_LOOPED: Final = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))


def modem_inputs(mcr: int) -> int:
    """MSR's high half: a cable with a ready peer, or in loopback MCR's outputs."""
    if not mcr & MCR_LOOP:
        return _CABLE_PLUGGED_IN
    return sum(status for output, status in _LOOPED if mcr & output)


def modem_status(before: int, mcr: int) -> int:
    """What MSR shows once MCR is ``mcr``, when it showed ``before``: changes stay until they are read."""
    inputs = modem_inputs(mcr)
    changed = (before ^ inputs) & 0xF0
    if inputs & MSR_RI:  # TERI is the trailing edge only
        changed &= ~MSR_RI
    return inputs | (before & 0x0F) | changed >> 4
