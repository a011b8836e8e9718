"""The socket device: virtio 1.2, section 5.10. Queues 0 (to the guest), 1 (from it) and 2 (events).

Packets for the guest are made only when it offers a buffer for them, so none is ever kept: what waits is flags and the
senders' own data. Packets of the guest are taken in turns of at most TURN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from asyncvmm.devices.checks import boolean, integer
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import VSOCK
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.devices.virtio.vsock.muxer import Muxer
from asyncvmm.devices.virtio.vsock.packet import (
    EVENT_TRANSPORT_RESET,
    HEADER_SIZE,
    HOST_CID,
    MAX_PAYLOAD,
    OP_RW,
    Header,
)
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import VsockMetrics

RX: Final = 0
TX: Final = 1
EVENT: Final = 2

QUEUE_SIZE: Final = 256
TURN: Final = 64
"""Packets, each way, that one call of ``process`` handles at the most."""

_MOST_CID = (1 << 32) - 2
_EVENT = EVENT_TRANSPORT_RESET.to_bytes(4, "little")


def _nobody() -> None:
    pass


class VirtioVsock(VirtioDevice):
    """The device of the guest ``guest_cid``; ``muxer`` has its connections, and wants a backend.

    ``call_again`` is called when more is ready for the guest than one turn takes: enter ``host`` again soon.
    """

    device_id: ClassVar[int] = VSOCK

    def __init__(self, guest_cid: int, metrics: VsockMetrics) -> None:
        super().__init__((QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE), 0, guest_cid.to_bytes(8, "little"), metrics)
        self.muxer = Muxer(guest_cid, metrics)
        self.call_again: Callable[[], None] = _nobody
        self._owes_reset_event = False

    @contextmanager
    def host(self) -> Iterator[Muxer]:
        """The muxer, for the host's half, on the loop; what is ready for the guest is on its way at the end."""
        with self.session() as alive:
            yield self.muxer
            if alive and self._deliver():
                self.call_again()

    # -- what the transport calls --------------------------------------------------------------------------------------

    def activate(self) -> None:
        """See VirtioDevice. Raises GuestFault where a queue for packets is missing."""
        if not (self.queues[RX].ready and self.queues[TX].ready):
            raise GuestFault("a socket device without both packet queues")

    def reset(self) -> None:
        """See VirtioDevice. Connections that the guest has never heard of wait for its next driver."""
        self._owes_reset_event = False
        self.muxer.reset()

    def process(self, index: int) -> bool:
        """See VirtioDevice. Raises GuestFault."""
        if index == RX:
            self.metrics.rx_queue_event_count += 1
            with self._counting("rx_queue_event_fails"):
                return self._deliver() or self._work_off()
        if index == TX:
            self.metrics.tx_queue_event_count += 1
            with self._counting("tx_queue_event_fails"):
                return self._work_off()
        if index == EVENT:
            with self._counting("ev_queue_event_fails"):
                self._tell_reset()
        return False

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        try:
            yield
        except GuestFault:
            self.count_failure(name)
            raise

    # -- from the guest ------------------------------------------------------------------------------------------------

    def _work_off(self) -> bool:
        """Take packets of the guest's, and send what they gave rise to. True if there is more of either to be done."""
        queue = self.queues[TX]
        for _ in queue.turn(TURN):
            chain = None if self.muxer.is_full else queue.pop()
            if chain is None:
                break
            self._take(chain)
            queue.push(chain, 0)
        more_to_send = self._deliver()
        return more_to_send or (not self.muxer.is_full and queue.available() > 0)

    def _take(self, chain: Chain) -> None:
        header = self._header_of(chain)
        if header is None:
            self.count_failure("tx_queue_event_fails")
            return
        payload = chain.read(header.len, HEADER_SIZE) if header.op == OP_RW else b""
        self.muxer.receive(header, payload)

    def _header_of(self, chain: Chain) -> Header | None:
        """The header of a packet that is whole, no longer than allowed, and from this guest to the host; else None."""
        if chain.writable or chain.readable_size < HEADER_SIZE:
            return None
        header = Header.decode(chain.read(HEADER_SIZE))
        room = min(MAX_PAYLOAD, chain.readable_size - HEADER_SIZE)
        if header.len > room or not self.muxer.is_addressed(header):
            return None
        return header

    # -- to the guest --------------------------------------------------------------------------------------------------

    def _deliver(self) -> bool:
        """Fill the guest's buffers. True if there are both packets and buffers left."""
        self._tell_reset()
        queue = self.queues[RX]
        for _ in queue.turn(TURN):
            if not self.muxer.has_packet:
                return False
            chain = queue.pop()
            if chain is None:
                return False
            self._fill(chain)
        return self.muxer.has_packet and queue.available() > 0

    def _fill(self, chain: Chain) -> None:
        queue = self.queues[RX]
        if chain.readable or chain.writable_size <= HEADER_SIZE:
            self.count_failure("rx_queue_event_fails")
            queue.push(chain, 0)
            return
        packet = self.muxer.next_packet(chain.writable_size - HEADER_SIZE)
        if packet is None:
            queue.undo_pop()
            return
        header, payload = packet
        chain.write(header.encode())
        chain.write(payload, HEADER_SIZE)
        queue.push(chain, HEADER_SIZE + len(payload))

    def _tell_reset(self) -> None:
        """Say in the event queue that every connection is gone, if that is due and the guest has a buffer there."""
        queue = self.queues[EVENT]
        if not self._owes_reset_event or (chain := queue.pop()) is None:
            return
        if chain.writable_size < len(_EVENT):
            self.count_failure("ev_queue_event_fails")
            queue.push(chain, 0)
            return
        chain.write(_EVENT)
        queue.push(chain, len(_EVENT))
        self._owes_reset_event = False

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See VirtioDevice. Connections are not kept: a restored guest is told that they are gone."""
        return {
            "guest_cid": self.muxer.guest_cid,
            "transport_reset": self.queues[EVENT].ready or self._owes_reset_event,
        }

    def restore_config(self, config: bytes) -> None:
        """See VirtioDevice. All that it says is in the device's own record."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """See VirtioDevice. The guest finds its connections gone, with the next thing that happens."""
        cid, owes = integer(state, "guest_cid", _MOST_CID), boolean(state, "transport_reset")
        if cid <= HOST_CID:
            raise ConfigError("saved guest_cid", expected=f"more than {HOST_CID}, the host's", found=cid)
        self.muxer.reset()
        self.muxer.guest_cid = cid
        self.config[:] = cid.to_bytes(8, "little")
        self._owes_reset_event = owes
