"""What every virtio device is to its transport: VirtioDevice, from which each is derived.

A device is a state machine over its queues. It does no I/O and never blocks: what it wants done it tells its backend,
which comes back later, on the loop, within a ``session``.

All methods are called with the device's lock held: ``process`` and what runs in a session on the loop, ``activate``,
``reset`` and ``write_config`` on the vCPU thread whose register access caused them. GuestFault may be raised wherever
a driver's doing is answered; the transport then asks the driver for a reset.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from asyncvmm.devices.virtio.queue import Queue
from asyncvmm.errors import ConfigError


class Transport(Protocol):
    """What a device asks of the transport it is attached to."""

    @property
    def running(self) -> bool:
        """Whether the driver is there, and neither side has given up."""

    def config_changed(self) -> None:
        """The configuration space has changed: show it to the driver, and tell it."""

    def session(self) -> AbstractContextManager[bool]:
        """The device's lock, for who comes from outside; gives whether the driver is there (DRIVER_OK).

        At its end the driver is interrupted for what was pushed meanwhile.
        """


class VirtioDevice:
    """A device as its transport sees it. ``queue_sizes``: the most descriptors of each queue, a power of two.

    features: the device's own feature bits. config: its configuration space, little-endian. metrics: its group of
    counters; those of ``activate_fails``, ``cfg_fails`` and ``event_fails`` that it has are counted here.
    """

    device_id: ClassVar[int]

    def __init__(self, queue_sizes: tuple[int, ...], features: int, config: bytes, metrics: object) -> None:
        self.queues = [Queue(size) for size in queue_sizes]
        self.features = features
        self.acked = 0
        self.config = bytearray(config)
        self.metrics: Any = metrics
        self.transport: Transport | None = None

    def has(self, bit: int) -> bool:
        """Whether the feature of that number was negotiated."""
        return bool(self.acked >> bit & 1)

    def session(self) -> AbstractContextManager[bool]:
        """See Transport.session. The device must be attached."""
        assert self.transport is not None
        return self.transport.session()

    @property
    def running(self) -> bool:
        """Whether a driver is there that keeps to the rules: rings of any other are not to be looked at."""
        return self.transport is not None and self.transport.running

    def config_changed(self) -> None:
        """Say that ``config`` is not what it was."""
        if self.transport is not None:
            self.transport.config_changed()

    def count_failure(self, name: str) -> None:
        """One more in a counter that not every device has."""
        if hasattr(self.metrics, name):
            setattr(self.metrics, name, getattr(self.metrics, name) + 1)

    # -- what a device is made of ----------------------------------------------------------------------------------

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to the configuration space. Ignored, unless a device has a field for it."""
        self.count_failure("cfg_fails")

    def activate(self) -> None:
        """DRIVER_OK: the queues that are ready stay so until ``reset``. Raises GuestFault."""

    def reset(self) -> None:
        """Forget the driver: features, requests under way. The queues are reset already."""

    def process(self, index: int) -> bool:
        """The driver kicked queue ``index``. Does a bounded amount of work; True asks to be called again soon.

        Raises GuestFault.
        """
        return False

    def drain(self) -> bool:
        """Whether nothing is under way that a snapshot would lose."""
        return True

    def state(self) -> dict[str, Any]:
        """What a snapshot keeps of the device itself, as plain values that JSON can carry (bytes as hex)."""
        return {}

    def restore_config(self, config: bytes) -> None:
        """Take the configuration space that was saved, of the size of our own; ``restore`` comes next.

        Raises ConfigError for one that the device cannot have had.
        """
        if config != self.config:
            raise ConfigError("saved config", expected=self.config.hex(), found=config.hex())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what ``state`` says; features and queues are there already. Raises ConfigError for nonsense."""
