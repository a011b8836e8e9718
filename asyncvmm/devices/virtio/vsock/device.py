"""The socket device: virtio 1.2, section 5.10. Queues 0 (to the guest), 1 (from it) and 2 (events).

Packets for the guest are made only when it offers a buffer for them, so none is ever kept: what waits is flags and the
senders' own data. Packets of the guest are taken in turns of at most TURN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Final

from asyncvmm.devices.checks import boolean, integer
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import VSOCK
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Chain, Queue
from asyncvmm.devices.virtio.vsock.connection import Connection, Payload
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

PATIENCE_S: Final = 0.02
"""How long a guest may not know that a packet of its own was taken. Nothing there waits for that: Linux frees the
packet then, as its network cards' drivers do with later packets alone. With an answer comes an interrupt anyway."""

_MOST_CID = (1 << 32) - 2
_EVENT = EVENT_TRANSPORT_RESET.to_bytes(4, "little")
_FAILURES: Final = ("rx_queue_event_fails", "tx_queue_event_fails", "ev_queue_event_fails")


def _nobody() -> None:
    pass


def _payload(chain: Chain, size: int) -> Payload:
    """Of a packet whose header says that it has so many bytes."""
    views = chain.readable
    if len(views) == 2 and len(views[0]) == HEADER_SIZE:  # as Linux makes them
        return views[1][:size]
    return chain.read(size, HEADER_SIZE)


def _header_and_data(chain: Chain) -> Sequence[memoryview] | None:
    """The two parts of a buffer for a packet; None for one that is not as Linux makes them."""
    views = chain.writable
    if len(views) == 2 and len(views[0]) == HEADER_SIZE and not chain.readable:
        return views
    if len(views) == 1 and len(views[0]) > HEADER_SIZE and not chain.readable:
        return views[0][:HEADER_SIZE], views[0][HEADER_SIZE:]
    return None


class _HostsHalf:
    """See VirtioVsock.host."""

    __slots__ = ("_device",)

    def __init__(self, device: VirtioVsock) -> None:
        self._device = device

    def __enter__(self) -> Muxer:
        self._device.session().__enter__()
        return self._device.muxer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None:
            try:
                self._device.deliver()
            except BaseException as failure:
                if not self._device.session().__exit__(type(failure), failure, failure.__traceback__):
                    raise
                return None
        return self._device.session().__exit__(kind, error, trace)


class VirtioVsock(VirtioDevice):
    """The device of the guest ``guest_cid``; ``muxer`` has its connections, and wants a backend.

    ``call_again`` is called when more is ready for the guest than one turn takes: enter ``host`` again soon.
    """

    device_id: ClassVar[int] = VSOCK

    def __init__(self, guest_cid: int, metrics: VsockMetrics) -> None:
        super().__init__((QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE), 0, guest_cid.to_bytes(8, "little"), metrics)
        self.muxer = Muxer(guest_cid, metrics)
        self.call_again: Callable[[], None] = _nobody
        self._half = _HostsHalf(self)
        self._steps: list[Callable[[], None]] | None = None
        self._later: Callable[[float, Callable[[], object]], object] | None = None
        self._reminds = False
        self._owes_reset_event = False

    def host(self) -> AbstractContextManager[Muxer]:
        """The muxer, for the host's half, on the loop; what is ready for the guest is on its way at the end."""
        return self._half

    def deliver(self) -> None:
        """Give the guest what is ready for it. In a session. Raises GuestFault."""
        if self.running and self._deliver():
            self.call_again()

    def be_patient(self, later: Callable[[float, Callable[[], object]], object]) -> None:
        """From now on tell the guest of packets that were taken with the next that it gets, or after PATIENCE_S; later:
        calls after so many seconds, on the loop."""
        self._later = later
        self.queues[TX].is_patient = True

    def at_end_of_turn(self, step: Callable[[], None]) -> bool:
        """While packets of the guest's are being taken: call ``step`` behind the last of them. False at other times."""
        if self._steps is None:
            return False
        self._steps.append(step)
        return True

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
        try:
            return self._process(index)
        except GuestFault:
            self.count_failure(_FAILURES[index])
            raise

    def _process(self, index: int) -> bool:
        if index == TX:
            self.metrics.tx_queue_event_count += 1
            return self._work_off()
        if index == RX:
            self.metrics.rx_queue_event_count += 1
            return self._deliver() or self._work_off()
        self._tell_reset()
        return False

    # -- from the guest ------------------------------------------------------------------------------------------------

    def _work_off(self) -> bool:
        """Take packets of the guest's, and send what they gave rise to. True if there is more of either to be done."""
        queue, muxer = self.queues[TX], self.muxer
        self._take_turn(queue)
        if queue.is_untold and queue.is_patient:
            self._remind_later()
        return self._deliver() or (not muxer.is_full and queue.available() > 0)

    def _take_turn(self, queue: Queue) -> None:
        steps = self._steps = []
        try:
            for _ in queue.turn(TURN):
                chain = None if self.muxer.is_full else queue.pop()
                if chain is None:
                    break
                self._take(chain)
                queue.push(chain, 0)
        finally:
            self._steps = None
            for step in steps:
                step()

    def _take(self, chain: Chain) -> None:
        header = self._header_of(chain)
        if header is None:
            self.count_failure("tx_queue_event_fails")
        elif header.op == OP_RW:
            self.muxer.receive(header, _payload(chain, header.len))
        else:
            self.muxer.receive(header, b"")

    def _header_of(self, chain: Chain) -> Header | None:
        """The header of a packet that is whole, no longer than allowed, and from this guest to the host; else None."""
        if chain.writable or chain.readable_size < HEADER_SIZE:
            return None
        first = chain.readable[0]
        header = Header.decode(first if len(first) >= HEADER_SIZE else chain.read(HEADER_SIZE))
        if header.len > MAX_PAYLOAD or header.len > chain.readable_size - HEADER_SIZE:
            return None
        return header if self.muxer.is_addressed(header) else None

    def _remind_later(self) -> None:
        if not self._reminds and self._later is not None:
            self._reminds = True
            self._later(PATIENCE_S, self._remind)

    def _remind(self) -> None:
        self._reminds = False
        with self.session() as alive:
            if alive:
                self.queues[TX].hurry()

    # -- to the guest --------------------------------------------------------------------------------------------------

    def _deliver(self) -> bool:
        """Fill the guest's buffers. True if there are both packets and buffers left."""
        if self._owes_reset_event:
            self._tell_reset()
        queue, muxer = self.queues[RX], self.muxer
        if not muxer.has_packet:
            return False
        sent = 0 if muxer.only_sender is None else self._send_run(queue, muxer.only_sender)
        if sent and not muxer.has_packet:
            return False
        for _ in queue.turn(TURN - sent):
            chain = queue.pop()
            if chain is None:
                return False
            self._fill(chain)
            if not muxer.has_packet:
                return False
        return queue.available() > 0

    def _send_run(self, queue: Queue, connection: Connection) -> int:
        """What ``_fill`` does, for many packets of one connection's data, and buffers as Linux makes them: the header's
        and the data's, or one for both. Whatever else comes is left. Returns how many packets have gone.
        """
        data = connection.sendable()
        end, at, count, header, header_for = len(data), 0, 0, b"", 0
        try:
            for _ in queue.turn(TURN if end else 0):
                chain = queue.pop()
                if chain is None:
                    break
                views = _header_and_data(chain)
                if views is None:
                    queue.undo_pop()
                    break
                size = min(len(views[1]), end - at, MAX_PAYLOAD)
                if size != header_for:
                    header, header_for = connection.data_header(size).encode(), size
                views[0][:] = header
                views[1][:size] = data[at : at + size]
                queue.push(chain, HEADER_SIZE + size)
                at, count = at + size, count + 1
                if at == end:
                    break
        finally:
            if count:
                self.muxer.note_sent(connection, count, at)
        return count

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
        views, size = chain.writable, len(payload)
        if len(views) == 2 and len(views[0]) == HEADER_SIZE:  # as Linux makes them
            views[0][:] = header.encode()
            views[1][:size] = payload
        else:
            chain.write(header.encode())
            chain.write(payload, HEADER_SIZE)
        queue.push(chain, HEADER_SIZE + size)

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
