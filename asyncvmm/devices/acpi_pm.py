"""Hardware-reduced ACPI's sleep registers and the reset register: how a guest powers itself off and restarts.

Facts: ACPI 6.5, 4.8.3.7 (SLEEP_CONTROL_REG: SLP_TYPx in bits 4:2, SLP_EN in bit 5; SLEEP_STATUS_REG: WAK_STS in bit 7)
and 4.8.3.6 (RESET_REG). The values are those that the tables of ``x86.acpi`` tell the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from asyncvmm.x86.layout import ACPI_RESET_VALUE, ACPI_SLEEP_ENABLE, ACPI_SLEEP_TYPE_S5, ACPI_SLEEP_TYPE_SHIFT

SLEEP_CONTROL: Final = 0
SLEEP_STATUS: Final = 1
RESET: Final = 2
PORT_COUNT: Final = 3

_SLEEP_TYPE_MASK: Final = 0x07


@attrs.frozen
class AcpiPmState:
    """The registers remember nothing: the guest that enters S5 or resets is gone."""


class AcpiPm:
    """SLEEP_CONTROL, SLEEP_STATUS and RESET_REG, at offsets 0, 1 and 2.

    shutdown: the guest entered S5. reset: it wrote the reset value. Other sleep states do not exist: asking for them
    does nothing. SLEEP_STATUS reads 0, as the machine never wakes from a sleep.
    """

    __slots__ = ("_reset", "_shutdown")

    def __init__(self, shutdown: Callable[[], None], reset: Callable[[], None]) -> None:
        self._shutdown = shutdown
        self._reset = reset

    @classmethod
    def from_state(cls, state: AcpiPmState, shutdown: Callable[[], None], reset: Callable[[], None]) -> AcpiPm:
        """The registers that ``state()`` described."""
        return cls(shutdown, reset)

    def state(self) -> AcpiPmState:
        """All that the registers remember."""
        return AcpiPmState()

    def read(self, offset: int) -> int:
        """SLEEP_STATUS, or a write-only register: 0."""
        return 0

    def write(self, offset: int, value: int) -> None:
        """Enter S5 or reset, if that is what ``value`` says."""
        if offset == SLEEP_CONTROL and value & ACPI_SLEEP_ENABLE:
            if value >> ACPI_SLEEP_TYPE_SHIFT & _SLEEP_TYPE_MASK == ACPI_SLEEP_TYPE_S5:
                self._shutdown()
        elif offset == RESET and value == ACPI_RESET_VALUE:
            self._reset()
