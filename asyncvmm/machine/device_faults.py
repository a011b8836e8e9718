"""Tells the log of devices whose drivers asked for something impossible, a few times for each."""

from __future__ import annotations

import logging
from typing import Final

MOST_TOLD: Final = 3
"""Of one device: its guest may reset it and begin anew as often as it likes."""

_log = logging.getLogger("asyncvmm.devices")


class FaultReport:
    """Called with what the driver of ``device``, of the guest ``vm``, did wrong."""

    def __init__(self, device: str, vm: str) -> None:
        self._whose = f"{device} of {vm}" if vm else device
        self._told = 0

    def __call__(self, fault: str) -> None:
        """The device does nothing more before its driver resets it. Called on any thread."""
        if self._told < MOST_TOLD:
            self._told += 1
            more = "; no more such faults are told" if self._told == MOST_TOLD else ""
            _log.warning("%s waits for a reset: its driver asked for the impossible: %s%s", self._whose, fault, more)
