"""A guest that asks for connections and takes no answer: what the host remembers of it has an end."""

from __future__ import annotations

import pytest

from asyncvmm.devices.virtio.vsock.connection import Connection
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.devices.virtio.vsock.muxer import MAX_KNOWN, MAX_REPLIES, TooManyConnections
from asyncvmm.devices.virtio.vsock.packet import HOST_CID, OP_REQUEST, TYPE_STREAM, Header
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.testing import Driver

CID, RX, TX = 3, 0, 1


class Hasty:
    """Gives every connection up at once, established or not."""

    def __init__(self, device: VirtioVsock, *, accepts: bool) -> None:
        self.device = device
        self.accepts = accepts

    def requested(self, connection: Connection) -> None:
        if self.accepts:
            connection.accept()
        self.device.muxer.release(connection)


def send(driver: Driver, port: int) -> None:
    header = Header(CID, HOST_CID, port, 80, 0, TYPE_STREAM, OP_REQUEST, 0, 4096, 0)
    driver.send(TX, [header.encode()])
    driver.kick(TX)
    driver.used(TX)


@pytest.mark.parametrize("accepts", [False, True], ids=["refused", "accepted and closed"])
def test_connections_that_the_host_gave_up_do_not_pile_up(accepts: bool) -> None:
    device = VirtioVsock(CID, VsockMetrics())
    device.muxer.backend = Hasty(device, accepts=accepts)
    driver = Driver(device)
    for number in range(MAX_KNOWN + MAX_REPLIES):
        send(driver, number)
    assert len(device.muxer) == MAX_KNOWN
    assert device.muxer.is_full
    with device.host() as muxer, pytest.raises(TooManyConnections):
        muxer.connect(1)


def test_a_guest_that_takes_its_answers_after_all_may_connect_again() -> None:
    device = VirtioVsock(CID, VsockMetrics())
    device.muxer.backend = Hasty(device, accepts=False)
    driver = Driver(device)
    for number in range(MAX_KNOWN):
        send(driver, number)
    while len(device.muxer):
        driver.send(RX, writable=[64])
        driver.kick(RX)
        driver.used(RX)
    with device.host() as muxer:
        assert muxer.connect(1)
