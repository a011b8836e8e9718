"""Devices held, saved and restored in the midst of their work, each with a driver that notices what is lost or doubled.

No KVM: kicks are eventfds, guests plain memory (support/device_rig.py).
"""

from __future__ import annotations

import random
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.device_config import NetConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.console.device import VirtioConsole
from asyncvmm.devices.virtio.net import RX, TX
from asyncvmm.net.addresses import Addresses, plan_addresses
from asyncvmm.net.mac import parse_mac
from asyncvmm.net.probe import arp_request, is_arp_reply
from tests.support.device_rig import Rig, until
from tests.support.disk_writer import Writer

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("seed", range(8))
async def test_not_one_write_is_lost_or_doubled_wherever_it_was(
    config: DeviceConfig, tmp_path: Path, seed: int, event_idx: bool
) -> None:
    chance = random.Random(seed)
    async with Rig(config, event_idx=event_idx) as rig:
        writer = Writer(rig.drivers["blk-disk"])
        for _ in range(chance.randrange(1, 6)):
            writer.submit(chance.randrange(1, 12), kick=chance.random() < 0.8)
            for _ in range(chance.randrange(4)):
                await checkpoint()
            if chance.random() < 0.5:
                writer.reap()
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            twin = writer.moved(again.drivers["blk-disk"])
            again.devices.unhold()
            rig.devices.unhold()
            twin.submit(5)
            writer.submit(3)
            await twin.finish()
            await writer.finish()


async def test_a_kick_that_nobody_saw_is_not_lost(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        driver = rig.drivers["rng"]
        driver.send(0, [], [64])
        driver.ring(0)
        saved = await rig.save(tmp_path / "saved")
        assert not driver.used(0)
        async with rig.restored(saved) as again:
            twin = again.drivers["rng"]
            again.devices.unhold()
            await until(lambda: twin.queue(0).used_index == 1)
            assert len(twin.used(0)[0].data) == 64
        rig.devices.unhold()
        await until(lambda: driver.queue(0).used_index == 1)


async def test_saves_of_saves_go_on_where_they_were(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as first:
        writer = Writer(first.drivers["blk-disk"])
        rig = first
        rigs: list[Rig] = []
        for generation in range(4):
            writer.submit(10)
            writer.reap()
            await checkpoint()
            saved = await rig.save(tmp_path / f"saved{generation}")
            again = await rig.restored(saved).__aenter__()
            rigs.append(again)
            writer, rig = writer.moved(again.drivers["blk-disk"]), again
            rig.devices.unhold()
            if generation % 2:
                await writer.finish()
        await writer.finish()
        assert writer.next > 20
        for again in reversed(rigs):
            await again.__aexit__(None, None, None)


async def test_what_the_guest_says_on_its_console_is_heard_once(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        driver, port = rig.drivers["console"], rig.devices.ports["console"]
        driver.send(1, [b"before,"])
        driver.ring(1)
        assert await port.receive() == b"before,"
        driver.send(1, [b"amidst,"])
        driver.ring(1)
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            twin = again.drivers["console"]
            twin.send(1, [b"after"])
            again.devices.unhold()
            heard = b""
            while len(heard) < 12:
                heard += await again.devices.ports["console"].receive()
            assert heard == b"amidst,after"
        rig.devices.unhold()
        assert await port.receive() == b"amidst,"


async def test_a_buffer_that_was_read_in_part_is_read_on(config: DeviceConfig, tmp_path: Path) -> None:
    data = bytes(range(256)) * 16
    async with Rig(config) as rig:
        driver, port = rig.drivers["console"], rig.devices.ports["console"]
        device = driver.device
        assert isinstance(device, VirtioConsole)
        device.ports[0].limit = 1000
        with anyio.move_on_after(0.01):
            await port.receive()  # hvc0 is held back once somebody reads it
        for _ in range(2):
            driver.send(1, [data])
        driver.ring(1)
        await until(lambda: device.ports[0].throttled)
        heard = await port.receive(10)
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            again.devices.unhold()
            rest = b""
            while len(rest) < 2 * len(data) - 1010:
                rest += await again.devices.ports["console"].receive()
            assert rest == (2 * data)[1010:], "what the host has taken is the host's"
        rig.devices.unhold()
        while len(heard) < 2 * len(data):
            heard += await port.receive()
        assert heard == 2 * data


@pytest.mark.requires("passt")
async def test_a_restored_card_has_its_address_and_a_network_of_its_own(tmp_path: Path) -> None:
    config = DeviceConfig(net=NetConfig())
    addresses = plan_addresses(NetConfig())
    async with Rig(config) as rig:
        mac = parse_mac(rig.resources.record.mac or "")
        question = bytes(12) + arp_request(mac, addresses.guest.ip, addresses.gateway)[4:]
        assert await answered(rig, question, addresses)
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            assert again.drivers["net-eth0"].config(0, 6) == mac
            again.devices.unhold()
            assert await answered(again, question, addresses)
            assert again.resources.record.net_fd != rig.resources.record.net_fd
        rig.devices.unhold()
        assert await answered(rig, question, addresses)


async def answered(rig: Rig, question: bytes, addresses: Addresses) -> bool:
    """Whether the gateway answers an ARP request."""
    driver = rig.drivers["net-eth0"]
    for _ in range(4):
        driver.send(RX, [], [2048])
    driver.ring(RX)
    driver.send(TX, [question])
    driver.ring(TX)
    frames: list[bytes] = []

    def heard() -> bool:
        driver.used(TX)
        frames.extend(used.data[12:] for used in driver.used(RX))
        return any(is_arp_reply(frame, addresses.gateway) for frame in frames)

    await until(heard)
    return True
