"""A virtio network card on a wire that a test holds in its hands."""

from __future__ import annotations

from collections.abc import Sequence

from asyncvmm.devices.virtio.net import HEADER_SIZE, RX, VIRTIO_NET_F_MAC, GuestOffloads, VirtioNet
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.testing.driver import Driver

MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
NO_HEADER = bytes(HEADER_SIZE)
CHECKED = bytes((2, *bytes(9)))
PLAIN_FEATURES = 1 << VIRTIO_NET_F_MAC


def frame(payload: bytes = b"x" * 50, *, source: bytes = MAC, target: bytes = OTHER) -> bytes:
    return target + source + b"\x08\x00" + payload


class Wire:
    """A backend that keeps what it is sent while it has room, and delivers what is put on it."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.left = room
        self.sent: list[bytes] = []
        self.waiting: list[bytes] = []
        self.starts: list[GuestOffloads] = []
        self.device: VirtioNet

    def start(self, offloads: GuestOffloads) -> None:
        self.starts.append(offloads)

    def receive(self) -> None:
        while self.waiting and self.device.deliver(self.waiting[0]):
            self.waiting.pop(0)

    def room(self) -> int:
        return self.left

    def send(self, packets: Sequence[bytes]) -> None:
        assert self.left > 0, "sent without room"
        self.left -= sum(map(len, packets))
        self.sent += [packet[HEADER_SIZE:] for packet in packets]

    def put(self, data: bytes) -> None:
        """The host has a frame."""
        self.waiting.append(data)
        with self.device.session() as alive:
            if alive:
                self.receive()

    def make_room(self, size: int) -> None:
        self.left = size
        for _ in range(1000):
            with self.device.session() as alive:
                if not alive or not self.device.transmit_more():
                    return
        raise AssertionError("the card never has enough")


def card(wire: Wire, *, mtu: int | None = None, offloads: bool = False) -> VirtioNet:
    wire.device = VirtioNet(MAC, wire, NetMetrics(), mtu=mtu, offloads=offloads)
    return wire.device


def started(wire: Wire, features: int | None = None, *, event_idx: bool = False, offloads: bool = False) -> Driver:
    driver = Driver(card(wire, offloads=offloads), features=features, event_idx=event_idx)
    driver.kick(RX)
    return driver


def metrics(driver: Driver) -> NetMetrics:
    found = driver.device.metrics
    assert isinstance(found, NetMetrics)
    return found
