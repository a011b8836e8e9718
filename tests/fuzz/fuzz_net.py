"""The network card under attack: frames come when they like, and go when there is room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncvmm.devices.virtio import net, net_receive
from asyncvmm.devices.virtio.net import (
    ETHERNET_HEADER,
    HEADER_SIZE,
    MAX_FRAME,
    RX,
    TX,
    GuestOffloads,
    VirtioNet,
)
from asyncvmm.devices.virtio.queue import DESCRIPTORS_A_TURN
from asyncvmm.metrics.groups import NetMetrics
from asyncvmm.testing import Driver
from tests.fuzz.guest import play
from tests.fuzz.limits import lowered
from tests.fuzz.script import Script
from tests.fuzz.target import Request, Target

MAC = bytes.fromhex("02aabbccddee")
_FRAME = b"\xff" * 6 + MAC + b"\x08\x00"
ROOM = 4096


class NetTarget(Target):
    """A card and its link, which keeps what the driver has no buffer for."""

    def __init__(self) -> None:
        self.offloads: bool | None = None
        self.space = ROOM
        self.sent: list[bytes] = []
        self.pending: list[bytes] = []

    def make(self, script: Script) -> VirtioNet:
        """See Target."""
        if self.offloads is None:
            self.offloads = script.flag()
        self.device = VirtioNet(MAC, self, NetMetrics(), mtu=1500, offloads=self.offloads)
        return self.device

    # -- the link: see NetBackend ----------------------------------------------------------------------------------

    def start(self, offloads: GuestOffloads) -> None:
        """See NetBackend."""
        assert self.watch.running

    def room(self) -> int:
        """See NetBackend."""
        return self.space

    def send(self, packets: Sequence[bytes]) -> None:
        """See NetBackend."""
        assert packets
        assert self.space > 0
        assert sum(map(len, packets[:-1])) < self.space, "more than there was room for"
        for packet in packets:
            assert HEADER_SIZE + ETHERNET_HEADER <= len(packet) <= HEADER_SIZE + MAX_FRAME
            assert packet[HEADER_SIZE + 6 : HEADER_SIZE + 12] == self.device.mac, "another one's address"
            assert self.offloads or packet[:2] == b"\0\0", "work that was not offered"
            self.space -= len(packet)
        self.sent += packets

    def receive(self) -> None:
        """See NetBackend."""
        end = self.device.receive_walked + DESCRIPTORS_A_TURN
        while self.pending and self.device.receive_walked < end and self.device.deliver(self.pending[0]):
            self.pending.pop(0)

    # -- the script ------------------------------------------------------------------------------------------------

    def request(self, script: Script, index: int) -> Request:
        """See Target."""
        if index == RX:
            return [], [script.pick((1526, 64, 12, 1, script.size() % 2048 + 1)) for _ in range(1 + script.byte() % 2)]
        header = bytes(HEADER_SIZE) if script.byte() % 4 else script.data(HEADER_SIZE)
        frame = _FRAME if script.byte() % 8 else script.data(ETHERNET_HEADER)
        size = script.size() % 2048
        if script.flag():
            return [header, frame + bytes(size)], []
        return [header + frame[:6], frame[6:], bytes(size or 1)], []

    def event(self, script: Script) -> None:
        """Frames arrive, the link takes more, or the cable is pulled."""
        kind = script.byte() % 5
        with self.device.session() as alive:
            if kind == 0:
                self.space = ROOM if script.flag() else 0
                self._send_on(alive)
            elif kind == 1:
                self.device.set_link(script.flag())
            elif len(self.pending) < 64:
                size = script.size() % 4096 if script.byte() % 16 else MAX_FRAME + script.byte() % 2
                self.pending += [bytes(size)] * (1 + script.byte() % 8)
            if alive and self.pending:
                self.receive()

    def _send_on(self, alive: bool) -> None:
        if alive and self.space > 0:
            for _ in range(self.most_turns):
                if not self.device.transmit_more():
                    return
            raise AssertionError("the device never has enough")

    def settle(self) -> None:
        """The link goes on until nothing is left."""

    def check(self) -> None:
        """See Target."""
        self.sent.clear()
        kept = sum(queue.in_flight for queue in self.device.queues)
        assert not kept or not self.watch.running, "chains are kept"

    def may_wait(self, index: int) -> bool:
        """Receive buffers wait for frames, and frames for room."""
        return index == RX or self.space <= 0

    def comparable(self, state: Mapping[str, Any]) -> Any:
        """A restored card has its own cable, and its driver is told if that is plugged in otherwise."""
        device = dict(state["device"], link_up=None)
        return dict(state, device=device, config=None, config_generation=None, interrupt_status=None)

    def serves(self, driver: Driver) -> None:
        """See Target."""
        self.space = ROOM
        self.pending.clear()
        self.check()
        frame = bytes(6) + self.device.mac + b"hello"
        driver.request(TX, [bytes(HEADER_SIZE), frame])
        assert [packet[HEADER_SIZE:] for packet in self.sent] == [frame]
        driver.send(RX, writable=[1526])
        with self.device.session():
            assert self.device.deliver(frame)
        assert [used.data[HEADER_SIZE:] for used in driver.used(RX)] == [frame]


def run(data: bytes) -> None:
    """One script."""
    with lowered(net, DESCRIPTORS_A_TURN=16), lowered(net_receive, DESCRIPTORS_A_FRAME=32):
        play(NetTarget(), data)
