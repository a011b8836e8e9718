"""Devices held, saved and restored in the midst of their work, each with a driver that notices what is lost or doubled.

No KVM: kicks are eventfds, guests plain memory (support/device_rig.py).
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.blk import SECTOR, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from asyncvmm.devices.virtio.console.device import VirtioConsole
from asyncvmm.devices.virtio.net import RX, TX
from asyncvmm.devices.virtio.vsock.device import EVENT
from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch
from asyncvmm.net.addresses import Addresses, plan_addresses
from asyncvmm.net.mac import parse_mac
from asyncvmm.net.probe import arp_request, is_arp_reply
from tests.support.device_rig import Rig, Saved, SlotDriver, until

pytestmark = pytest.mark.anyio

SECTORS = 2048
MOST_OPEN = 20
"""Requests at a time: of three descriptors each, in a queue of 64."""

HEADER = struct.Struct("<IIQ")


@pytest.fixture
def image(tmp_path: Path, temporary_directory: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(SECTORS * SECTOR))
    return path


@pytest.fixture
def config(image: Path) -> DeviceConfig:
    return DeviceConfig(
        drives=(DriveConfig(path=image, id="disk", overlay=True),),
        rng=RngConfig(bytes_per_s=0),
        console=ConsoleConfig(),
        vsock=VsockConfig(),
        balloon=BalloonConfig(mib=7),
    )


def content(number: int) -> bytes:
    return struct.pack("<Q", number) * (SECTOR // 8)


class Writer:
    """Writes sector after sector, each with its own number in it, and sees that each is answered once."""

    def __init__(self, driver: SlotDriver) -> None:
        self.driver = driver
        self.next = 0
        self.open: dict[int, int] = {}
        self.answered: list[int] = []

    def moved(self, driver: SlotDriver) -> Writer:
        twin = Writer(driver)
        twin.next, twin.open, twin.answered = self.next, dict(self.open), list(self.answered)
        return twin

    def submit(self, count: int, *, kick: bool = True) -> None:
        for _ in range(min(count, MOST_OPEN - len(self.open))):
            header = HEADER.pack(VIRTIO_BLK_T_OUT, 0, self.next % SECTORS)
            head = self.driver.send(0, [header, content(self.next)], [1])
            assert head not in self.open
            self.open[head] = self.next
            self.next += 1
        if kick:
            self.driver.ring(0)

    def reap(self) -> None:
        for used in self.driver.used(0):
            number = self.open.pop(used.head)  # a KeyError: answered twice, or never asked for
            assert used.data == b"\0"
            self.answered.append(number)

    async def finish(self) -> None:
        """Until everything is answered, then see that it is on the disk."""

        def done() -> bool:
            self.reap()
            return not self.open

        await until(done)
        assert sorted(self.answered) == list(range(self.next))
        for number in range(max(0, self.next - SECTORS), self.next):
            header = HEADER.pack(VIRTIO_BLK_T_IN, 0, number % SECTORS)
            self.driver.send(0, [header], [SECTOR, 1])
            self.driver.ring(0)
            found: list[Any] = []
            await until(lambda found=found: found.extend(self.driver.used(0)) or found)
            assert found[0].data == content(number) + b"\0"


# -- nothing lost, nothing doubled -------------------------------------------------------------------------------------


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


# -- held --------------------------------------------------------------------------------------------------------------


async def test_nothing_in_guest_memory_moves_while_the_devices_are_held(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(20)
        await checkpoint()
        for name in ("rng", "console"):
            rig.drivers[name].send(0, [], [512])
        await rig.devices.hold()
        before = bytes(rig.memory.view)
        for driver in rig.drivers.values():
            for index in range(len(driver.queues)):
                driver.ring(index)
        assert rig.devices.vsock is not None
        assert rig.devices.balloon is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rig.devices.ports["console"].send, b"to the guest")
            tasks.start_soon(swallow, rig.devices.vsock.connect, 7)
            await anyio.sleep(0.05)
            # A register write changes rings of flags; nobody has made any.
            assert bytes(rig.memory.view) == before
            rig.devices.unhold()
            await until(lambda: rig.drivers["console"].queue(0).used_index == 1)
            assert rig.drivers["console"].used(0)[0].data == b"to the guest"
            tasks.cancel_scope.cancel()
        await until(lambda: rig.drivers["rng"].queue(0).used_index == 1)
        await writer.finish()


async def swallow(function: Any, *arguments: Any) -> None:
    try:
        await function(*arguments)
    except Exception:
        return


async def test_an_interrupt_that_was_due_while_held_comes_afterwards(config: DeviceConfig) -> None:
    async with Rig(config) as rig:
        slot = next(slot for slot in rig.devices.slots if slot.name == "balloon")
        await rig.devices.hold()
        interrupts = eventfd_of(slot)
        slot.device.config_changed()
        assert drained(interrupts) == 0
        assert rig.drivers["balloon"].acknowledge() & 2
        rig.devices.unhold()
        assert drained(interrupts) == 1


async def test_a_restored_device_interrupts_once_for_what_was_on_its_way(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [0] * 5
            again.devices.unhold()
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [1] * 5
            await again.devices.hold()
            again.devices.unhold()
            assert [drained(eventfd_of(slot)) for slot in again.devices.slots] == [0] * 5


def eventfd_of(slot: Any) -> int:
    fd: int = slot._interrupt_fd
    return fd


def drained(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def test_a_restored_guest_hears_that_its_connections_are_gone(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        rig.drivers["vsock"].send(EVENT, [], [8])
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            again.devices.unhold()
            await until(lambda: again.drivers["vsock"].queue(EVENT).used_index == 1)
            assert again.drivers["vsock"].used(EVENT)[0].data == bytes(4)
        rig.devices.unhold()
        await anyio.sleep(0.01)
        assert not rig.drivers["vsock"].used(EVENT)


async def test_a_restored_balloon_is_as_large_as_it_was(config: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(config) as rig:
        driver = rig.drivers["balloon"]
        driver.write(0x104, 5 * 256)
        saved = await rig.save(tmp_path / "saved")
        async with rig.restored(saved) as again:
            assert again.drivers["balloon"].config(0, 8) == struct.pack("<II", 7 * 256, 5 * 256)


async def test_a_disk_that_hangs_keeps_nobody_from_pausing_but_is_not_saved(
    config: DeviceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr("asyncvmm.machine.kvm.devices.HOLD_TIMEOUT_S", 0.05)
    async with Rig(config) as rig:
        (drive,) = rig.devices._drives
        write = drive.disk._image.write
        monkeypatch.setattr(drive.disk._image, "write", lambda *a, **k: (gate.wait(), write(*a, **k)))
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(3)
        await until(lambda: not drive.device.drain())
        with pytest.raises(SnapshotFailed, match="idle disks"):
            await rig.save(tmp_path / "saved")
        before = bytes(rig.memory.view)
        gate.set()
        await anyio.sleep(0.05)
        assert bytes(rig.memory.view) == before
        rig.devices.unhold()
        await writer.finish()


async def test_a_pause_that_is_cancelled_leaves_the_devices_at_work(
    config: DeviceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    async with Rig(config) as rig:
        (drive,) = rig.devices._drives
        write = drive.disk._image.write
        monkeypatch.setattr(drive.disk._image, "write", lambda *a, **k: (gate.wait(), write(*a, **k)))
        writer = Writer(rig.drivers["blk-disk"])
        writer.submit(3)
        await until(lambda: not drive.device.drain())
        with anyio.move_on_after(0.02) as scope:
            await rig.devices.hold()
        assert scope.cancelled_caught
        gate.set()
        writer.submit(3)
        await writer.finish()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> DeviceConfig:
    return DeviceConfig(rng=RngConfig(), console=ConsoleConfig(ports=("data",)))


async def test_other_devices_than_those_saved_are_refused(small: DeviceConfig, tmp_path: Path) -> None:
    async with Rig(small) as rig:
        saved = await rig.save(tmp_path / "saved")
        for other in (
            attrs.evolve(small, rng=None),
            attrs.evolve(small, balloon=BalloonConfig()),
            attrs.evolve(small, console=ConsoleConfig(ports=("other",))),
            attrs.evolve(small, console=ConsoleConfig()),
        ):
            with pytest.raises(SnapshotMismatch):
                await Rig(other, of=(rig, saved)).__aenter__()


@pytest.mark.parametrize("section", [b"", b"{", b"[]", b"null", b'"text"', b"7", b'{"rng":7,"console":{}}', b"\0" * 99])
async def test_a_section_that_is_none_is_refused(small: DeviceConfig, tmp_path: Path, section: bytes) -> None:
    async with Rig(small) as rig:
        saved = await rig.save(tmp_path / "saved")
        with pytest.raises((SnapshotDamaged, SnapshotMismatch)):
            await Rig(small, of=(rig, attrs.evolve(saved, section=section))).__aenter__()


NONSENSE: tuple[Any, ...] = (None, -1, 1 << 63, "x", [], {}, True)


async def test_no_value_of_a_section_does_harm(config: DeviceConfig, tmp_path: Path) -> None:
    """Each value in turn is replaced by nonsense: the section is refused, or the devices bear it."""
    async with Rig(config) as rig:
        saved = await rig.save(tmp_path / "saved")
        plain = json.loads(saved.section)
        for index, place in enumerate(places(plain)):
            for value in NONSENSE[index % 3 :: 3]:
                await bear(rig, saved, replaced(plain, place, value))


async def bear(rig: Rig, saved: Saved, plain: Any) -> None:
    again = Rig(rig.config, of=(rig, attrs.evolve(saved, section=json.dumps(plain).encode())))
    try:
        await again.__aenter__()
    except (SnapshotDamaged, SnapshotMismatch):
        return
    again.devices.unhold()
    await anyio.sleep(0.001)
    await again.__aexit__(None, None, None)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += places(entry, (*path, key))
    return found


def replaced(plain: Any, path: tuple[Any, ...], value: Any) -> Any:
    twin = copy.deepcopy(plain)
    at = twin
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return twin
