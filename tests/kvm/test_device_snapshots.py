"""A guest with a disk, saved in the midst of its requests and restored: not one of them lost, not one done twice."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm.device_config import DriveConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import SnapshotMismatch
from asyncvmm.machine.base import BootPlan, Resources
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.resources import HostResources, SavedResources
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.storage.snapshot import save_drives
from asyncvmm.timing.timeline import Timeline
from tests.kvm.conftest import Run
from tests.support.device_rig import Folder

pytestmark = pytest.mark.anyio

MEMORY_MIB = 4
SECTOR, SECTORS = 512, 64
MOMENTS = 30
REQUESTS = 60
GREETING = b"READY\n"
WHOLE = GREETING + bytes(range(1, REQUESTS + 1)) + struct.pack("<H", 2 * REQUESTS)


@attrs.frozen
class Kept:
    """A machine as it stood, and how much it had said by then."""

    machine: SavedMachine
    memory: MemoryLayer
    drives: list[dict[str, object]]
    folder: Folder
    said: int


@attrs.define
class Lab:
    """Machines with a disk, and what is kept of them."""

    kernel: Path
    devices: DeviceConfig
    place: Path
    count: int = 0
    memories: list[int] = attrs.field(factory=list)

    @asynccontextmanager
    async def boot(self) -> AsyncIterator[tuple[Run, HostResources]]:
        async with self._machine(None) as (run, resources):
            await run.machine.start()
            yield run, resources

    @asynccontextmanager
    async def restore(self, kept: Kept) -> AsyncIterator[tuple[Run, HostResources]]:
        saved = SavedResources(drives=kept.drives, open_file=kept.folder.open_file)
        async with self._machine(saved) as (run, resources):
            await run.machine.restore(RestorePlan(saved=kept.machine, layers=(kept.memory,)))
            yield run, resources

    @asynccontextmanager
    async def _machine(self, saved: SavedResources | None) -> AsyncIterator[tuple[Run, HostResources]]:
        resources, run = HostResources(), Run()
        try:
            await resources.make_ready(self.devices, "kvm", Timeline(), saved)
            plan = BootPlan(
                name="disktest",
                memory_mib=MEMORY_MIB,
                vcpus=1,
                kernel=self.kernel,
                initrd=None,
                devices=self.devices,
                resources=resources.record,
            )
            run.machine = KvmMachine(plan, Timeline(), run.take)
            try:
                yield run, resources
            finally:
                await run.machine.stop()
        finally:
            await resources.aclose()

    async def keep(self, run: Run, resources: HostResources, said: int = 0) -> Kept:
        """Save a machine that is paused."""
        self.count += 1
        folder = Folder(self.place / f"kept{self.count}")
        fd = os.memfd_create("memory")
        self.memories.append(fd)
        os.ftruncate(fd, MEMORY_MIB << 20)
        writer = MemoryWriter(fd, MEMORY_MIB << 20)
        saved = await run.machine.save(writer)
        drives = await save_drives(Resources(drives=resources.record.drives), folder)
        return Kept(saved, MemoryLayer(fd=fd, map=saved.memory), drives, folder, said + len(run.output))


@pytest.fixture(params=["virtio-disk", "virtio-disk-event-idx"])
def lab(
    request: pytest.FixtureRequest, guest: Callable[[str], Path], tmp_path: Path, temporary_directory: Path
) -> Iterator[Lab]:
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTORS * SECTOR))
    drive = DriveConfig(path=image, id="disk", overlay=True, cache="unsafe")
    lab = Lab(guest(request.param), DeviceConfig(drives=(drive,)), tmp_path)
    yield lab
    for fd in lab.memories:
        os.close(fd)


async def finish(run: Run, said: int = 0) -> None:
    """The guest itself sees that each sector it reads is the one it wrote, and the ring goes one by one."""
    assert (await run.end()).code == 0x11
    assert run.output == WHOLE[said:]


async def test_at_whatever_moment_the_guest_is_saved_it_goes_on_there(lab: Lab) -> None:
    chance = random.Random(17)
    async with lab.boot() as (run, resources):
        await run.said(GREETING)
        for _ in range(MOMENTS):
            await anyio.sleep(chance.uniform(0, 0.004))
            await run.machine.pause()
            if run.ends:
                break
            kept = await lab.keep(run, resources)
            async with lab.restore(kept) as (again, _):
                await again.machine.resume()
                await finish(again, kept.said)
            await run.machine.resume()
        await finish(run)
    assert lab.count > 4


async def test_a_restored_guest_is_saved_and_restored_like_any_other(lab: Lab) -> None:
    kept: Kept | None = None
    async with lab.boot() as (run, resources):
        await run.said(GREETING + b"\1")
        await run.machine.pause()
        kept = await lab.keep(run, resources)
    for _ in range(5):
        async with lab.restore(kept) as (run, resources):
            said = kept.said
            await run.machine.resume()
            await run.said(bytes([len(run.output) + said - len(GREETING) + 4]))
            await run.machine.pause()
            kept = await lab.keep(run, resources, said)
            await run.machine.resume()
            await finish(run, said)


async def test_one_that_was_restored_and_not_run_is_what_it_was(lab: Lab) -> None:
    async with lab.boot() as (run, resources):
        await run.said(GREETING + b"\1\2\3")
        await run.machine.pause()
        kept = await lab.keep(run, resources)
    async with lab.restore(kept) as (again, resources):
        twice = await lab.keep(again, resources, kept.said)
    assert twice.machine.sections["devices"] == kept.machine.sections["devices"]
    async with lab.restore(twice) as (last, _):
        await last.machine.resume()
        await finish(last, kept.said)


async def test_other_devices_than_the_saved_ones_are_refused(lab: Lab) -> None:
    async with lab.boot() as (run, resources):
        await run.said(GREETING)
        await run.machine.pause()
        kept = await lab.keep(run, resources)
    (drive,) = lab.devices.drives
    other = attrs.evolve(lab, devices=DeviceConfig(drives=(attrs.evolve(drive, id="other"),)))
    with pytest.raises(SnapshotMismatch, match="disk"):
        async with other.restore(kept):
            pass
