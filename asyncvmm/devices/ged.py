"""The register behind the generic event device: which event the host has for the guest.

Facts: ACPI 6.5, 5.6.9 (a GED's interrupt runs its _EVT method). Ours, in ``x86.acpi``, reads one byte, which gives the
pending events and clears them, and notifies the power button or the VM generation ID's device if its bit is set. The
latter's driver, when it asks where the ID is, has a byte written here that says so.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from asyncvmm.devices.checks import flag, within
from asyncvmm.x86.layout import ACPI_EVENT_GENERATION, ACPI_EVENT_POWER_BUTTON, ACPI_HEED_GENERATION


@attrs.frozen(kw_only=True)
class GedState:
    """``pending``: the events the guest has not read. ``heeds_generation``: it looks at its VM generation ID."""

    pending: int = attrs.field(default=0, validator=within(0, ACPI_EVENT_POWER_BUTTON | ACPI_EVENT_GENERATION))
    heeds_generation: bool = attrs.field(default=False, validator=flag)


class Ged:
    """One port. ``interrupt`` drives the edge-triggered line: it is raised and lowered for each new event."""

    __slots__ = ("_heeds_generation", "_interrupt", "_pending")

    def __init__(self, interrupt: Callable[[bool], None]) -> None:
        self._interrupt = interrupt
        self._pending = 0
        self._heeds_generation = False

    @classmethod
    def from_state(cls, state: GedState, interrupt: Callable[[bool], None]) -> Ged:
        """The device that ``state()`` described. An event still pending pulses the line again: better than never."""
        device = cls(interrupt)
        device._heeds_generation = state.heeds_generation
        if state.pending:
            device._raise(state.pending)
        return device

    def state(self) -> GedState:
        """All that this device remembers."""
        return GedState(pending=self._pending, heeds_generation=self._heeds_generation)

    @property
    def heeds_generation(self) -> bool:
        """Whether the guest's driver looks at the VM generation ID."""
        return self._heeds_generation

    def read(self, offset: int) -> int:
        """The pending events, which are pending no more."""
        pending, self._pending = self._pending, 0
        return pending

    def write(self, offset: int, value: int) -> None:
        """A driver says that it looks at the VM generation ID; nothing else has a meaning."""
        if value == ACPI_HEED_GENERATION:
            self._heeds_generation = True

    def press_power_button(self) -> None:
        """Ask the guest to shut down. The loop's side; the caller holds the device's lock."""
        self._raise(ACPI_EVENT_POWER_BUTTON)

    def announce_generation(self) -> None:
        """Tell the guest that it has a new VM generation ID. As press_power_button."""
        self._raise(ACPI_EVENT_GENERATION)

    def _raise(self, event: int) -> None:
        self._pending |= event
        self._interrupt(True)
        self._interrupt(False)
