"""A virtio network card (virtio 1.2, section 5.1): one pair of queues, no control queue.

The card knows frames and the header before each (section 5.1.6); where frames come from and go to is its backend's
affair. Towards the guest a backend calls ``deliver``; where no receive buffer is there it keeps the frame and waits
for its own ``receive`` to be called. From the guest the card takes frames only while the backend has room; it is told
of new room by ``transmit_more``. So nothing piles up here, and nothing is lost without being counted.

The guest sends under its own address alone: a frame of another source is dropped, and counted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

import attrs

from asyncvmm.devices.checks import boolean, hex_bytes, integer
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import NET
from asyncvmm.devices.virtio.net_receive import ReceiveQueue
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import NetMetrics

VIRTIO_NET_F_CSUM: Final = 0
VIRTIO_NET_F_GUEST_CSUM: Final = 1
VIRTIO_NET_F_MTU: Final = 3
VIRTIO_NET_F_MAC: Final = 5
VIRTIO_NET_F_GUEST_TSO4: Final = 7
VIRTIO_NET_F_GUEST_TSO6: Final = 8
VIRTIO_NET_F_GUEST_ECN: Final = 9
VIRTIO_NET_F_HOST_TSO4: Final = 11
VIRTIO_NET_F_HOST_TSO6: Final = 12
VIRTIO_NET_F_HOST_ECN: Final = 13
VIRTIO_NET_F_MRG_RXBUF: Final = 15
VIRTIO_NET_F_STATUS: Final = 16

VIRTIO_NET_S_LINK_UP: Final = 1

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_F_DATA_VALID: Final = 2
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80

RX, TX = 0, 1
HEADER_SIZE: Final = 12
"""Of struct virtio_net_hdr with num_buffers, which VERSION_1 always has."""

ETHERNET_HEADER: Final = 14
MAX_FRAME: Final = 65535 + ETHERNET_HEADER + 4
"""Bytes of the longest frame: the longest IP packet behind an Ethernet header with a VLAN tag."""

MIN_MTU, MAX_MTU = 68, 65535
QUEUE_SIZE: Final = 256

DESCRIPTORS_A_TURN: Final = 512
"""Once so many were looked at, the loop gets its turn."""

_CONFIG = struct.Struct("<6sHHH")
_NUM_BUFFERS_AT: Final = 10
_SOURCE = slice(HEADER_SIZE + 6, HEADER_SIZE + 12)
_ALWAYS: Final = (VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_GUEST_CSUM)
_OFFLOADS: Final = (
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
)
_PLAIN: Final = bytes(_NUM_BUFFERS_AT)
_CHECKED: Final = bytes((VIRTIO_NET_HDR_F_DATA_VALID, *bytes(_NUM_BUFFERS_AT - 1)))
_GSO_FEATURES: Final = {
    VIRTIO_NET_HDR_GSO_TCPV4: VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_HDR_GSO_TCPV6: VIRTIO_NET_F_HOST_TSO6,
}


@attrs.frozen
class GuestOffloads:
    """What the driver takes: frames whose checksum is still to be made, segments of more than the MTU, ECN in them."""

    csum: bool
    tso4: bool
    tso6: bool
    ecn: bool


class NetBackend(Protocol):
    """Where frames come from and go to. Every method is called on the loop, within ``process`` or a session."""

    def start(self, offloads: GuestOffloads) -> None:
        """A driver is there: from now on ``deliver`` may be called."""

    def receive(self) -> None:
        """The driver has new receive buffers: deliver what waits for one, and go on."""

    def room(self) -> int:
        """Bytes that ``send`` takes now; 0 or less: none before ``transmit_more``."""

    def send(self, packets: Sequence[bytes]) -> None:
        """Take these frames, each behind its virtio header of HEADER_SIZE bytes. The last may exceed ``room``."""


class VirtioNet(VirtioDevice):
    """The card of address ``mac`` (six bytes).

    mtu: what the driver shall take for the largest packet, 68 to 65535; None to say nothing. offloads: whether the
    backend makes checksums and segments for the guest, and may leave them to it; one that does passes headers through.
    Raises ConfigError.
    """

    device_id: ClassVar[int] = NET
    metrics: NetMetrics

    def __init__(
        self,
        mac: bytes,
        backend: NetBackend,
        metrics: NetMetrics,
        *,
        mtu: int | None = None,
        offloads: bool = False,
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise ConfigError("mac", expected="six bytes of a unicast address", found=mac.hex(":"))
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ConfigError("mtu", expected=f"{MIN_MTU} to {MAX_MTU}", found=mtu)
        bits = _ALWAYS + (_OFFLOADS if offloads else ()) + ((VIRTIO_NET_F_MTU,) if mtu is not None else ())
        super().__init__((queue_size, queue_size), sum(1 << bit for bit in bits), b"", metrics)
        self.queues[RX] = self._receive = ReceiveQueue(queue_size)
        self.mac = bytes(mac)
        self.mtu = mtu or 0
        self.link_up = True
        self._backend = backend
        self._started = False
        self._show_config()

    def _show_config(self) -> None:
        status = VIRTIO_NET_S_LINK_UP if self.link_up else 0
        self.config = bytearray(_CONFIG.pack(self.mac, status, 1, self.mtu))

    def set_link(self, up: bool) -> None:
        """Plug the cable in or out, as far as the driver sees."""
        if up != self.link_up:
            self.link_up = up
            self._show_config()
            self.config_changed()

    # -- the driver's doings ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """See VirtioDevice. The backend hears of it when it next wants to deliver something."""
        self._started = False

    def process(self, index: int) -> bool:
        """See VirtioDevice."""
        if not self._started:
            self._started = True
            self._backend.start(self._guest_offloads())
        if index == RX:
            self.metrics.rx_queue_event_count += 1
            self._backend.receive()
            return False
        self.metrics.tx_queue_event_count += 1
        if not self.queues[TX].available():
            self.metrics.no_tx_avail_buffer += 1
            return False
        return self._transmit()

    def _guest_offloads(self) -> GuestOffloads:
        csum = self.has(VIRTIO_NET_F_GUEST_CSUM)
        tso4, tso6 = self.has(VIRTIO_NET_F_GUEST_TSO4), self.has(VIRTIO_NET_F_GUEST_TSO6)
        return GuestOffloads(csum, csum and tso4, csum and tso6, self.has(VIRTIO_NET_F_GUEST_ECN))

    # -- from the guest --------------------------------------------------------------------------------------------

    def transmit_more(self) -> bool:
        """The backend has room again. True asks to be called once more, soon. Raises GuestFault."""
        return self._transmit()

    def _transmit(self) -> bool:
        """Take frames while there is room for them. True if a turn's work was done before that."""
        queue, room, left = self.queues[TX], self._backend.room(), DESCRIPTORS_A_TURN
        packets = []
        while room > 0 and left > 0:
            chain = queue.pop()
            if chain is None:
                break
            left -= len(chain.readable) + len(chain.writable)
            packet = self._take(chain)
            queue.push(chain, 0)
            if packet is not None:
                packets.append(packet)
                room -= len(packet)
        if packets:
            self._count_sent(packets)
            self._backend.send(packets)
        remaining = queue.available()
        self.metrics.tx_remaining_reqs_count += remaining
        return remaining > 0 and self._backend.room() > 0

    def _count_sent(self, packets: Sequence[bytes]) -> None:
        self.metrics.tx_count += 1
        self.metrics.tx_packets_count += len(packets)
        self.metrics.tx_bytes_count += sum(map(len, packets)) - HEADER_SIZE * len(packets)

    def _take(self, chain: Chain) -> bytes | None:
        """A copy of a frame with its header, which the guest cannot change any more; None if it is not to be sent."""
        if not HEADER_SIZE + ETHERNET_HEADER <= chain.readable_size <= HEADER_SIZE + MAX_FRAME:
            self.metrics.tx_malformed_frames += 1
            return None
        packet = chain.read()
        if packet[_SOURCE] != self.mac:
            self.metrics.tx_spoofed_mac_count += 1
            return None
        if (packet[0] or packet[1]) and not self._may_offload(packet[0], packet[1]):
            self.metrics.tx_malformed_frames += 1
            return None
        return packet

    def _may_offload(self, flags: int, gso_type: int) -> bool:
        """Whether a header asks only for what was negotiated (5.1.6.2.1)."""
        if flags & ~VIRTIO_NET_HDR_F_NEEDS_CSUM or (flags and not self.has(VIRTIO_NET_F_CSUM)):
            return False
        if gso_type & VIRTIO_NET_HDR_GSO_ECN and not self.has(VIRTIO_NET_F_HOST_ECN):
            return False
        kind = gso_type & ~VIRTIO_NET_HDR_GSO_ECN
        if kind == VIRTIO_NET_HDR_GSO_NONE:
            return not gso_type
        feature = _GSO_FEATURES.get(kind)
        return feature is not None and bool(flags) and self.has(feature)

    # -- to the guest ----------------------------------------------------------------------------------------------

    @property
    def receive_walked(self) -> int:
        """Descriptors of receive buffers that were looked at until now; it only grows."""
        return self._receive.walked

    def deliver(self, frame: memoryview | bytes, header: memoryview | bytes | None = None) -> bool:
        """Give the guest a frame. False: it has no buffer for it; keep the frame until ``receive`` is called.

        header: the virtio header that came with it; None for a frame that was checked and has its checksums. A frame
        that no driver could take is dropped, and counted. Raises GuestFault.
        """
        if not self._started:
            return False
        if not ETHERNET_HEADER <= len(frame) <= MAX_FRAME:
            self.metrics.rx_fails += 1
            return True
        merge = self.has(VIRTIO_NET_F_MRG_RXBUF)
        if merge and self._receive.fill_plain(bytearray(self._header(header, 0)) + frame):
            self._count_received(len(frame))
            return True
        chains = self._receive.take(HEADER_SIZE + len(frame), merge=merge)
        if chains is None:
            self.metrics.no_rx_avail_buffer += 1
            return False
        if not chains:
            self.metrics.rx_fails += 1
            return True
        self._fill(chains, self._header(header, len(chains)), frame)
        self._count_received(len(frame))
        return True

    def _count_received(self, size: int) -> None:
        self.metrics.rx_count += 1
        self.metrics.rx_packets_count += 1
        self.metrics.rx_bytes_count += size

    def _header(self, header: memoryview | bytes | None, buffers: int) -> bytes:
        """The header of a frame for the guest, with the count of buffers it lies in."""
        if not self.has(VIRTIO_NET_F_GUEST_CSUM):
            header = _PLAIN
        elif header is None:
            header = _CHECKED
        return bytes(header[:_NUM_BUFFERS_AT]) + buffers.to_bytes(2, "little")

    def _fill(self, chains: list[Chain], header: bytes, frame: memoryview | bytes) -> None:
        if len(chains) == 1:
            chains[0].write(header)
            chains[0].write(frame, HEADER_SIZE)
            self._receive.push(chains[0], HEADER_SIZE + len(frame))
            return
        packet, at, filled = memoryview(header + frame), 0, []
        for chain in chains:
            written = chain.write(packet[at : at + chain.writable_size])
            filled.append((chain, written))
            at += written
        self._receive.push_together(filled)

    # -- snapshots -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See VirtioDevice."""
        return {"mac": self.mac.hex(), "mtu": self.mtu, "link_up": self.link_up}

    def restore_config(self, config: bytes) -> None:
        """See VirtioDevice. All that it says is in the device's own record."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """See VirtioDevice. The card becomes the one the driver knows: its address and MTU are the saved ones.

        Not so the cable, which is the host's affair: a driver that knows it otherwise is told.
        """
        mac = hex_bytes(state, "mac", 6)
        if len(mac) != 6 or mac[0] & 1:
            raise ConfigError("saved mac", expected="six bytes of a unicast address", found=mac.hex(":"))
        mtu = integer(state, "mtu", MAX_MTU)
        if mtu and mtu < MIN_MTU:
            raise ConfigError("saved mtu", expected=f"0 or {MIN_MTU} to {MAX_MTU}", found=mtu)
        was_up = boolean(state, "link_up")
        self.mac, self.mtu = mac, mtu
        self._started = False
        self._show_config()
        if was_up != self.link_up:
            self.config_changed()
