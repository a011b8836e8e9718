"""The state machine of a vhost-user back end: a transport for any of our virtio devices, as virtio-mmio is for KVM.

Sans-I/O: what needs descriptors or mappings is asked of a shell. All of it happens on the loop.

A ring runs between its kick descriptor (and, with protocol features, its enabling) and GET_VRING_BASE. QEMU stops rings
both when the guest resets the device and when the guest is paused, and does not say which. Rings that start again
where they stopped, at the same addresses, were paused; anything else is a new driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final, Protocol

import attrs

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    TRANSPORT_FEATURES,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
)
from asyncvmm.devices.virtio.memory import GuestFault, GuestView
from asyncvmm.devices.virtio.queue import Queue
from asyncvmm.devices.virtio.service import QueueService
from asyncvmm.machine.qemu.vhost_user.message import (
    F_PROTOCOL_FEATURES,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_MQ,
    PROTOCOL_F_REPLY_ACK,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    Message,
    Region,
    Request,
    RingAddresses,
    VhostUserError,
    decode_addresses,
    decode_config,
    decode_regions,
    decode_state,
    decode_u64,
    encode_config,
    encode_state,
    encode_u64,
    reply,
)

MOST_DESCRIPTORS: Final = 1024
"""QEMU's virtio-mmio offers every queue of that size, whatever its device has."""

PROTOCOL_FEATURES: Final = 1 << PROTOCOL_F_MQ | 1 << PROTOCOL_F_REPLY_ACK | 1 << PROTOCOL_F_CONFIG


class Shell(Protocol):
    """What the state machine asks of the world. Descriptors given here are the caller's: a copy is kept."""

    def map(self, regions: Sequence[Region], descriptors: Sequence[int]) -> GuestView:
        """The memory of these regions. Raises VhostUserError."""

    def watch_kick(self, index: int, descriptor: int | None) -> None:
        """Call ``Backend.kick`` for ring ``index`` when that eventfd is written; None: no more. Raises
        VhostUserError."""

    def set_call(self, index: int, descriptor: int | None) -> None:
        """The eventfd that interrupts the guest for that ring. Raises VhostUserError."""

    def call(self, index: int) -> None:
        """Write it."""

    def work(self, index: int) -> None:
        """Call ``Backend.kick`` for that ring soon."""

    def gave_up(self, fault: str) -> None:
        """The guest's driver asked for something impossible; nothing is done for it before it starts anew."""


@attrs.define
class Ring:
    """What the front end said of one ring."""

    size: int = 0
    base: int = 0
    addresses: RingAddresses | None = None
    has_kick: bool = False
    enabled: bool = False
    running: bool = False
    stopped_at: tuple[int, RingAddresses | None] | None = None


class Backend(QueueService):
    """The transport of ``device``, to be driven by the messages of one front end.

    rings: how many of the device's queues the front end leaves to us, from the first on.
    """

    def __init__(self, device: VirtioDevice, shell: Shell, rings: int) -> None:
        self.device = device
        self._shell = shell
        self._rings = [Ring() for _ in range(rings)]
        self._regions: list[Region] = []
        self._lock = nullcontext()  # everything is done on the loop
        self._memory: GuestView | None = None
        self._protocol_features = 0
        self._starts_enabled = True
        self._running = False
        self._offered = device.features | TRANSPORT_FEATURES | 1 << F_PROTOCOL_FEATURES
        self._handlers = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._ignore,
            Request.RESET_OWNER: self._ignore,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
        }
        for queue in device.queues[:rings]:
            queue.max_size = MOST_DESCRIPTORS
        device.transport = self

    # -- for the device ------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the guest's driver is there."""
        return self._running

    def config_changed(self) -> None:
        """See device.Transport. There is no way to say so: no device here changes its configuration."""

    def close(self) -> None:
        """The front end has gone, and with it the guest."""
        self._running = False
        for index, ring in enumerate(self._rings):
            self._stop(index, ring)
        self.device.reset()
        if self._memory is not None:
            self._memory.close()

    def _queues(self) -> Sequence[Queue]:
        return self.device.queues[: len(self._rings)]

    def _notify(self, index: int) -> None:
        self._shell.work(index)

    def _tell_used(self, indices: Sequence[int]) -> None:
        for index in indices:
            self._shell.call(index)

    def _fault(self, fault: GuestFault) -> None:
        """The guest asked for something impossible: nothing more is done for it until its driver starts anew."""
        self._running = False
        self._shell.gave_up(str(fault))

    # -- messages ------------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> bytes | None:
        """Follow a message; what to answer. Raises VhostUserError."""
        try:
            handler = self._handlers[Request(message.request)]
        except ValueError:
            raise VhostUserError(f"request {message.request}") from None
        answer = handler(message)
        if answer is not None:
            return reply(message.request, answer)
        acknowledge = message.needs_reply and self._protocol_features >> PROTOCOL_F_REPLY_ACK & 1
        return reply(message.request, encode_u64(0)) if acknowledge else None

    def _ignore(self, message: Message) -> None:
        pass

    def _get_features(self, message: Message) -> bytes:
        return encode_u64(self._offered)

    def _set_features(self, message: Message) -> None:
        features = decode_u64(message.payload)
        if features & ~self._offered:
            raise VhostUserError(f"features {features:#x} of {self._offered:#x}")
        self._starts_enabled = not features >> F_PROTOCOL_FEATURES & 1
        self.device.acked = features & ~(1 << F_PROTOCOL_FEATURES)

    def _get_protocol_features(self, message: Message) -> bytes:
        return encode_u64(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        features = decode_u64(message.payload)
        if features & ~PROTOCOL_FEATURES:
            raise VhostUserError(f"protocol features {features:#x} of {PROTOCOL_FEATURES:#x}")
        self._protocol_features = features

    def _get_queue_num(self, message: Message) -> bytes:
        return encode_u64(len(self.device.queues))

    def _get_config(self, message: Message) -> bytes:
        offset, size, _ = decode_config(message.payload)
        data = bytes(self.device.config[offset : offset + size])
        return encode_config(offset, data) if len(data) == size else b""

    def _set_config(self, message: Message) -> None:
        offset, size, data = decode_config(message.payload)
        if offset + size <= len(self.device.config):
            self.device.write_config(offset, data)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        regions = decode_regions(message.payload)
        if len(message.descriptors) != len(regions):
            raise VhostUserError(f"{len(message.descriptors)} descriptors for {len(regions)} memory regions")
        self._memory = self._shell.map(regions, message.descriptors)
        self._regions = regions
        for index, ring in enumerate(self._rings):
            if ring.running:
                self._move(index, self._memory)

    def _move(self, index: int, memory: GuestView) -> None:
        """Let a running ring go on in memory that is mapped anew."""
        queue = self.device.queues[index]
        try:
            queue.restore(queue.state(), memory, **self._ring_features())
        except GuestFault as fault:
            self._fault(fault)

    def _guest_address(self, user_address: int) -> int:
        for region in self._regions:
            if region.user_address <= user_address < region.user_address + region.size:
                return user_address - region.user_address + region.guest_address
        raise VhostUserError(f"a ring at {user_address:#x}, in no memory region")

    # -- rings ---------------------------------------------------------------------------------------------------------

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise VhostUserError(f"ring {index} of {len(self._rings)}")
        return self._rings[index]

    def _stopped_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if ring.running:
            raise VhostUserError(f"a change of ring {index} while it runs")
        return ring

    def _set_vring_num(self, message: Message) -> None:
        index, size = decode_state(message.payload)
        self._stopped_ring(index).size = size

    def _set_vring_addr(self, message: Message) -> None:
        index, addresses = decode_addresses(message.payload)
        self._stopped_ring(index).addresses = addresses

    def _set_vring_base(self, message: Message) -> None:
        index, base = decode_state(message.payload)
        if base > 0xFFFF:
            raise VhostUserError(f"ring {index} from {base} on")
        self._stopped_ring(index).base = base

    def _get_vring_base(self, message: Message) -> bytes:
        index, _ = decode_state(message.payload)
        ring = self._ring(index)
        self._running = False
        self._stop(index, ring)
        return encode_state(index, ring.base)

    def _set_vring_kick(self, message: Message) -> None:
        index, descriptor = self._descriptor(message)
        if descriptor is None:
            raise VhostUserError(f"ring {index} without a kick")
        ring = self._ring(index)
        self._shell.watch_kick(index, descriptor)
        ring.has_kick = True
        ring.enabled |= self._starts_enabled
        self._start(index, ring)

    def _set_vring_call(self, message: Message) -> None:
        self._shell.set_call(*self._descriptor(message))

    def _set_vring_err(self, message: Message) -> None:
        self._descriptor(message)

    def _set_vring_enable(self, message: Message) -> None:
        index, enabled = decode_state(message.payload)
        ring = self._ring(index)
        ring.enabled = bool(enabled)
        if ring.enabled:
            self._start(index, ring)
        else:
            self._running = False

    def _descriptor(self, message: Message) -> tuple[int, int | None]:
        value = decode_u64(message.payload)
        index, expected = value & VRING_INDEX_MASK, 0 if value & VRING_NO_FD else 1
        self._ring(index)
        if len(message.descriptors) != expected:
            raise VhostUserError(f"{len(message.descriptors)} descriptors instead of {expected}")
        return index, message.descriptors[0] if expected else None

    def _ring_features(self) -> dict[str, bool]:
        return {
            "event_idx": self.device.has(VIRTIO_F_EVENT_IDX),
            "indirect": self.device.has(VIRTIO_F_INDIRECT_DESC),
        }

    def _start(self, index: int, ring: Ring) -> None:
        """Start the ring if all is there, and the device with the last of them."""
        if not (ring.has_kick and ring.enabled):
            return
        if not ring.running:
            self._enable(index, ring)
        if all(other.running and other.enabled for other in self._rings) and not self._running:
            self._start_device()

    def _enable(self, index: int, ring: Ring) -> None:
        if ring.addresses is None or self._memory is None:
            raise VhostUserError(f"ring {index} started before it was described")
        used = self._guest_address(ring.addresses.used)
        record = {
            "size": ring.size,
            "descriptors": self._guest_address(ring.addresses.descriptors),
            "driver_area": self._guest_address(ring.addresses.available),
            "device_area": used,
            "ready": True,
            "next_avail": ring.base,
        }
        try:
            next_used = int.from_bytes(self._memory.read(used + 2, 2), "little")
            record |= {"next_used": next_used, "signalled": next_used}
            self.device.queues[index].restore(record, self._memory, **self._ring_features())
        except (GuestFault, ValueError) as error:
            raise VhostUserError(f"ring {index}: {error}") from None
        ring.running = True

    def _start_device(self) -> None:
        if any(ring.stopped_at != (ring.base, ring.addresses) for ring in self._rings):
            self.device.reset()
        try:
            self.device.activate()
        except GuestFault as fault:
            self.device.count_failure("activate_fails")
            self._fault(fault)
            return
        self._running = True
        for index in range(len(self._rings)):
            self._shell.work(index)  # what was kicked before we listened

    def _stop(self, index: int, ring: Ring) -> None:
        if ring.running:
            queue = self.device.queues[index]
            ring.base = queue.state()["next_avail"]
            ring.stopped_at = (ring.base, ring.addresses)
            queue.reset()
        ring.running = ring.has_kick = False
        self._shell.watch_kick(index, None)
