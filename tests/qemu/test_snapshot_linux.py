"""Linux on the QEMU machine, booted and saved once with two processors and devices; and many clones of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from asyncvmm.balloon import Balloon
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, RngConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.guest.archive import workload_archive
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline
from tests.support.byte_streams import read_until
from tests.support.guest_agent import PORT, SCRIPT, Agent
from tests.support.qemu_machine import PATIENCE_S, Witness, default_image, running, tsc_khz
from tests.support.requirements import require

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "image")]

MIB = 1 << 20
MEMORY_MIB = 256
MAC = "02:00:00:00:00:2b"

COUNTING = r"""
(while :; do i=$((i+1)); echo $i >/tmp/count.new; mv /tmp/count.new /tmp/count; sleep 0.02; done) &
"""


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The boot is shared, so is the loop; the other one sees restores in test_snapshot_machine.py."""
    return "asyncio", {"use_uvloop": True}


@attrs.define
class Guest:
    """A Linux with an agent in it."""

    machine: QemuMachine
    witness: Witness
    disk: Path
    wire: socket.socket

    async def run(self, command: str) -> str:
        """The output of a shell command in the guest, its exit status last."""
        return await Agent(self.machine.ports[PORT]).attempt(command)

    async def count(self) -> int:
        return int((await self.run("cat /tmp/count")).split()[0])


@attrs.frozen
class Taken:
    """A Linux that was saved: its plan, its state, its memory file, and its disk as it was then."""

    plan: BootPlan
    machine: SavedMachine
    memory: Path
    disk: Path
    count: int

    async def memory_checksum(self) -> str:
        return await anyio.to_thread.run_sync(lambda: hashlib.md5(self.memory.read_bytes()).hexdigest())

    @asynccontextmanager
    async def clone(self, directory: Path) -> AsyncIterator[Guest]:
        """A guest that goes on from there, with a disk of its own."""
        disk = directory / f"disk-{os.urandom(4).hex()}"
        await anyio.to_thread.run_sync(shutil.copyfile, self.disk, disk)
        drive = attrs.evolve(self.plan.resources.drives[0], path=disk)
        ours, theirs = socket.socketpair()
        resources = Resources(drives=(drive,), net_fd=theirs.fileno())
        plan = attrs.evolve(self.plan, resources=resources, kernel=Path("/gone"), initrd=None)
        witness = Witness()
        machine = QemuMachine(plan, Timeline(), witness.take)
        with ours, theirs, self.memory.open("rb") as file:
            layer = MemoryLayer(fd=file.fileno(), map=self.machine.memory)
            await machine.restore(RestorePlan(saved=self.machine, layers=(layer,)))
            try:
                await machine.resume()
                yield Guest(machine, witness, disk, ours)
            finally:
                await machine.stop()


async def take(guest: Guest, plan: BootPlan, directory: Path) -> Taken:
    """Save a guest, which goes on."""
    count = await guest.count()
    await guest.machine.pause()
    memory, disk = directory / "memory", directory / "disk-saved"
    with memory.open("w+b") as file:
        saved = await guest.machine.save(MemoryWriter(file.fileno(), MEMORY_MIB << 20))
    await anyio.to_thread.run_sync(shutil.copyfile, guest.disk, disk)
    await guest.machine.resume()
    return Taken(plan, saved, memory, disk, count)


def plan_of(disk: Path, net_fd: int) -> BootPlan:
    image = default_image()
    drive = DriveConfig(path=disk, id="disk")
    return BootPlan(
        name="saved",
        memory_mib=MEMORY_MIB,
        vcpus=2,
        kernel=image.kernel,
        initrd=image.initrd,
        appended=workload_archive(("sh", "-c", COUNTING + SCRIPT), ()),
        cmdline="console=ttyS0 8250.nr_uarts=1 panic=-1 quiet",
        tsc_khz=tsc_khz(),
        devices=DeviceConfig(
            drives=(drive,),
            net=NetConfig(),
            balloon=BalloonConfig(free_page_reporting=True),
            rng=RngConfig(),
            console=ConsoleConfig(ports=(PORT,)),
        ),
        resources=Resources(drives=(DriveResource(drive, disk),), net_fd=net_fd, mac=MAC),
    )


@pytest.fixture(scope="module")
async def life(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Guest, Taken]]:
    """The original, and what was saved of it."""
    require("qemu")
    directory = tmp_path_factory.mktemp("saved")
    disk = directory / "disk"
    disk.write_bytes(b"untouched\n".ljust(4 * MIB, b"\1"))
    ours, theirs = socket.socketpair()
    plan = plan_of(disk, theirs.fileno())
    with ours, theirs:
        async with running(plan, find_qemu()) as (machine, witness):
            guest = Guest(machine, witness, disk, ours)
            await witness.until_said("control", b"\nREADY\n")
            await guest.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")
            await guest.run("echo before > /tmp/before; echo saved | dd of=/dev/vda conv=fsync,notrunc")
            yield guest, await take(guest, plan, directory)


async def test_a_clone_goes_on_counting_where_the_original_was_saved(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    async with taken.clone(tmp_path) as clone:
        first = await clone.count()
        assert taken.count <= first < taken.count + 200
        await clone.run(f"while [ $(cat /tmp/count) -lt {first + 5} ]; do sleep 0.02; done")
        assert await clone.run("cat /tmp/before") == "before\nstatus=0"
        heard = clone.witness.output("control")
        assert b"BOOT_TIME" not in heard


async def test_the_original_goes_on_too_and_can_be_saved_again(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    original, taken = life
    assert await original.run("echo later > /tmp/later") == "status=0"
    again = await take(original, taken.plan, tmp_path)
    assert await original.count() >= again.count > taken.count
    async with again.clone(tmp_path) as clone:
        assert await clone.run("cat /tmp/later") == "later\nstatus=0"


async def test_clones_do_not_disturb_each_other_nor_the_snapshot(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    before = await taken.memory_checksum()
    async with taken.clone(tmp_path) as one, taken.clone(tmp_path) as other:
        for clone, name in ((one, "one"), (other, "other")):
            assert await clone.run(f"echo {name} > /tmp/name; head -c 1048576 /dev/zero > /tmp/fill") == "status=0"
            await clone.run(f"echo {name} | dd of=/dev/vda conv=fsync,notrunc")
        for clone, name in ((one, "one"), (other, "other")):
            assert await clone.run("cat /tmp/name; head -n1 /dev/vda") == f"{name}\n{name}\nstatus=0"
            assert clone.disk.read_bytes().startswith(name.encode())
    assert await taken.memory_checksum() == before
    assert taken.disk.read_bytes().startswith(b"saved\n")


async def test_both_processors_run_in_a_clone(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    async with taken.clone(tmp_path) as clone:
        found = await clone.run("nproc; for cpu in 1 2; do taskset $cpu sh -c 'echo $((6*7))'; done")
        assert found == "2\n42\n42\nstatus=0"


async def test_the_devices_of_a_clone_work(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    async with taken.clone(tmp_path) as clone:
        assert await clone.run("head -n1 /dev/vda; cat /sys/block/vda/serial") == "saved\ndiskstatus=0"
        assert (await clone.run("head -c 64 /dev/hwrng | wc -c")).split() == ["64", "status=0"]
        await clone.run("echo on hvc0 > /dev/hvc0")
        with anyio.fail_after(PATIENCE_S):
            assert b"on hvc0" in await read_until(clone.machine.ports["console"], b"\n")


async def test_frames_of_a_clone_bear_the_saved_cards_address(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    async with taken.clone(tmp_path) as clone:
        await clone.run("arping -c 1 -w 1 -I eth0 10.9.0.1")
        found = await anyio.to_thread.run_sync(clone.wire.recv, 65536)
        size = int.from_bytes(found[:4])
        assert len(found) >= 4 + size
        assert bytes.fromhex(MAC.replace(":", "")) in found[4 : 4 + size]


async def test_a_balloon_in_a_clone_leaves_the_snapshot_as_it_is(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    before = await taken.memory_checksum()
    async with taken.clone(tmp_path) as clone:
        balloon = Balloon(lambda: clone.machine.balloon, MEMORY_MIB)
        with anyio.fail_after(PATIENCE_S):
            assert await balloon.set(96) == 96
            assert (await balloon.stats()).actual_mib == 96
            assert await balloon.set(0) == 0
        assert await clone.run("cat /tmp/before") == "before\nstatus=0"
    assert await taken.memory_checksum() == before


async def test_a_clone_can_be_saved_and_cloned(life: tuple[Guest, Taken], tmp_path: Path) -> None:
    _, taken = life
    async with taken.clone(tmp_path) as clone:
        await clone.run("echo second > /tmp/second; echo again | dd of=/dev/vda conv=fsync,notrunc")
        second = await take(clone, taken.plan, tmp_path)
        async with second.clone(tmp_path) as grandchild:
            assert await grandchild.run("cat /tmp/before /tmp/second") == "before\nsecond\nstatus=0"
            assert await grandchild.run("head -n1 /dev/vda") == "again\nstatus=0"
            assert await grandchild.count() >= second.count
        assert await clone.run("cat /tmp/second") == "second\nstatus=0"
