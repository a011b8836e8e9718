"""What a device's fuzz target has to say, beside what is the same for all: Target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.queue import DESCRIPTORS_A_TURN, MOST_DESCRIPTORS
from asyncvmm.testing import Driver
from tests.fuzz.memory import ObservedView
from tests.fuzz.script import Script
from tests.fuzz.watch import Watch

Request = tuple[list[bytes], list[int]]
"""The readable parts of a chain, and the sizes of its writable ones."""


class Target:
    """One device, its backend, and what may be expected of the two."""

    most_pops = 1024
    """Chains that one call of ``process`` may take."""

    most_walked = 2 * (DESCRIPTORS_A_TURN + MOST_DESCRIPTORS)
    """Descriptors that one call of ``process`` may look at."""

    most_turns = 2048
    """Calls of ``process`` after which a kick must have been worked off."""

    watch: Watch
    view: ObservedView

    def make(self, script: Script) -> VirtioDevice:
        """A new device with a new backend; what the old ones did is forgotten."""
        raise NotImplementedError

    def request(self, script: Script, index: int) -> Request:
        """A chain as a driver might offer it on that queue."""
        return [script.data(script.size() % 64) for _ in range(script.byte() % 3)], [
            script.size() % 2048 for _ in range(script.byte() % 4)
        ]

    def event(self, script: Script) -> None:
        """Something happens on the host."""

    def settle(self) -> None:
        """Everything that is under way comes to its end."""

    def check(self) -> None:
        """What must hold of the device at every moment."""

    def may_wait(self, index: int) -> bool:
        """Whether chains may rest in that queue, though the device has said that it has no more to do."""
        return False

    def comparable(self, state: Mapping[str, Any]) -> Any:
        """A saved state, without what may differ once it was restored and saved again."""
        return state

    def serves(self, driver: Driver) -> None:
        """A well-behaved driver gets what it asks for."""
        raise NotImplementedError
