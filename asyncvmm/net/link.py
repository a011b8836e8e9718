"""What joins a network card to a descriptor of the host's on the event loop: the part both kinds of link share.

Work is done in batches, bounded for each turn of the loop. While the guest has no receive buffer nothing is read; while
the host takes nothing, a bounded backlog waits here, and the card leaves the rest in the guest's own queue.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from asyncvmm.devices.virtio.queue import DESCRIPTORS_A_TURN

if TYPE_CHECKING:
    from asyncvmm.devices.virtio.net import GuestOffloads, VirtioNet

MAX_BACKLOG: Final = 256 * 1024
"""Bytes that wait for the host, but for the last frame taken."""


def _nothing(_: Exception) -> None:
    pass


class Link(ABC):
    """A NetBackend over ``fd``, which stays its owner's: close the link before the descriptor. On the loop's thread.

    on_down: is told once, on a later turn, why the host's end is gone; the driver sees no carrier then, and what it
    sends is counted as lost. fail: is told of an error of ours.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fd: int,
        *,
        on_down: Callable[[Exception], None] = _nothing,
        fail: Callable[[Exception], None] | None = None,
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._on_down = on_down
        self._fail = fail
        self._device: VirtioNet | None = None
        self._backlog: deque[memoryview] = deque()
        self._waiting = 0
        self._reading = self._writing = False
        self._turn_ends = 0
        self._next_turn: asyncio.Handle | None = None
        self.down = False

    @property
    def device(self) -> VirtioNet:
        """The card."""
        assert self._device is not None
        return self._device

    def attach(self, device: VirtioNet) -> None:
        """Be the backend of this card. Once, before there is a driver."""
        self._device = device

    def close(self) -> None:
        """Let go of the descriptor. May be called again; what waits here is lost."""
        self.down = True
        self._read_on(False)
        self._write_on(False)
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._backlog.clear()
        self._waiting = 0

    # -- NetBackend ------------------------------------------------------------------------------------------------

    def start(self, offloads: GuestOffloads) -> None:  # noqa: B027 (a link without offloads has nothing to do)
        """See NetBackend."""

    def room(self) -> int:
        """See NetBackend. A link that is down takes everything, and counts it as lost."""
        return MAX_BACKLOG - self._waiting

    def send(self, packets: Sequence[bytes]) -> None:
        """See NetBackend."""
        if self.down:
            self.device.metrics.tx_fails += len(packets)
            return
        for packet in packets:
            self._enqueue(packet)
        if not self._writing:
            self._write()

    def receive(self) -> None:
        """See NetBackend."""
        self._begin_turn()
        if not self.down and self._deliver_pending():
            self._read_on(True)

    # -- reading ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _deliver_pending(self) -> bool:
        """Give the card what was read before; False if it has no room for all of it."""

    @abstractmethod
    def _read(self) -> bool:
        """Read a turn's worth and deliver it; False if the card has no more room. Raises OSError, MachineError."""

    def _readable(self) -> None:
        try:
            with self.device.session() as alive:
                self.device.metrics.rx_tap_event_count += 1
                self._begin_turn()
                self._read_on(alive and self._deliver_pending() and self._read())
        except Exception as error:
            self._failed(error)

    def _begin_turn(self) -> None:
        self._turn_ends = self.device.receive_walked + DESCRIPTORS_A_TURN

    def _may_go_on(self) -> bool:
        """Whether this turn may deliver more. If not, the next one will: the guest makes its buffers of many parts."""
        if self.device.receive_walked < self._turn_ends:
            return True
        if self._next_turn is None:
            self._next_turn = self._loop.call_soon(self._go_on)
        return False

    def _go_on(self) -> None:
        self._next_turn = None
        if not self.down:
            self._readable()

    def _read_on(self, wanted: bool) -> None:
        """Look for what the host has, or no more."""
        wanted = wanted and not self.down
        if wanted and not self._reading:
            self._loop.add_reader(self._fd, self._readable)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._fd)
        self._reading = wanted

    # -- writing ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _enqueue(self, packet: bytes) -> None:
        """Put a frame with its virtio header behind the backlog."""

    @abstractmethod
    def _write_some(self) -> None:
        """Write from the head of the backlog, a turn's worth at the most. Raises OSError."""

    def _wait(self, piece: memoryview) -> None:
        self._backlog.append(piece)
        self._waiting += len(piece)

    def _write(self) -> None:
        """Write what the host takes, and wait for it if it does not take all."""
        before = time.monotonic_ns()
        try:
            self._write_some()
        except BlockingIOError:
            pass
        except OSError as error:
            self.device.metrics.tap_write_fails += 1
            self._lose(error)
        self.device.metrics.tap_write_agg.record((time.monotonic_ns() - before) // 1000)
        self._write_on(bool(self._backlog))

    def _writable(self) -> None:
        """The host takes more: what waits here first, then what waits in the guest."""
        more = False
        try:
            with self.device.session() as alive:
                if self._backlog:
                    self._write()
                if alive and self.room() > 0:
                    more = self.device.transmit_more()
            self._write_on(more or bool(self._backlog))
        except Exception as error:
            self._failed(error)

    def _write_on(self, wanted: bool) -> None:
        """Wait for the host to take something, or no more."""
        wanted = wanted and not self.down
        if wanted and not self._writing:
            self._loop.add_writer(self._fd, self._writable)
        elif self._writing and not wanted:
            self._loop.remove_writer(self._fd)
        self._writing = wanted

    # -- the end ---------------------------------------------------------------------------------------------------

    def _lose(self, error: Exception) -> None:
        """The host's end is gone."""
        if not self.down:
            self.close()
            self.device.set_link(False)
            self._loop.call_soon(self._on_down, error)

    def _failed(self, error: Exception) -> None:
        """We are wrong: stop, and say so."""
        self.close()
        if self._fail is None:
            raise error
        self._fail(error)
