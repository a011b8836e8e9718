"""The register behind the generic event device: which event the host has for the guest.

Facts: ACPI 6.5, 5.6.9 (a GED's interrupt runs its _EVT method). Ours, in ``x86.acpi``, reads one byte, which gives the
pending events and clears them, and notifies the power button if its bit is set.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from asyncvmm.devices.checks import within
from asyncvmm.x86.layout import ACPI_EVENT_POWER_BUTTON


@attrs.frozen(kw_only=True)
class GedState:
    """``pending``: the events the guest has not read."""

    pending: int = attrs.field(default=0, validator=within(0, ACPI_EVENT_POWER_BUTTON))


class Ged:
    """One port. ``interrupt`` drives the edge-triggered line: it is raised and lowered for each new event."""

    __slots__ = ("_interrupt", "_pending")

    def __init__(self, interrupt: Callable[[bool], None]) -> None:
        self._interrupt = interrupt
        self._pending = 0

    @classmethod
    def from_state(cls, state: GedState, interrupt: Callable[[bool], None]) -> Ged:
        """The device that ``state()`` described. An event still pending pulses the line again: better than never."""
        device = cls(interrupt)
        if state.pending:
            device._raise(state.pending)
        return device

    def state(self) -> GedState:
        """All that this device remembers."""
        return GedState(pending=self._pending)

    def read(self, offset: int) -> int:
        """The pending events, which are pending no more."""
        pending, self._pending = self._pending, 0
        return pending

    def write(self, offset: int, value: int) -> None:
        """Writes have no meaning."""

    def press_power_button(self) -> None:
        """Ask the guest to shut down. The loop's side; the caller holds the device's lock."""
        self._raise(ACPI_EVENT_POWER_BUTTON)

    def _raise(self, event: int) -> None:
        self._pending |= event
        self._interrupt(True)
        self._interrupt(False)
