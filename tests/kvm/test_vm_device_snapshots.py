"""Snapshots of VMs that have devices, every kind at once, and a disk at work: taken, cloned, refused, nothing left."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.device_config import ConsoleConfig, DriveConfig, NetConfig, VsockConfig
from asyncvmm.errors import SnapshotDamaged, SnapshotFailed, SnapshotMismatch, StateError
from asyncvmm.snapshot.snapshot import Snapshot
from tests.support.echoing import echoed
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that no other mapping has."""

REQUESTS = 60
MANY_REQUESTS = 250
END = struct.pack("<H", 2 * REQUESTS)
"""The last that guest virtio-disk says: its used index."""

PATIENCE_S = 60

NewVm = Callable[..., VM]


@pytest.fixture
def image(tmp_path: Path, temporary_directory: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(64 * 512))
    return path


@pytest.fixture
def every(image: Path) -> dict[str, Any]:
    """Every device that needs no helper."""
    return {
        "drives": [
            DriveConfig(path=image, id="own", overlay=True),
            DriveConfig(path=image, id="shared", read_only=True),
        ],
        "balloon": True,
        "vsock": True,
        "rng": True,
        "virtio_console": ConsoleConfig(ports=("data",)),
    }


@pytest.fixture
def new_vm(guest: Callable[[str], Path]) -> NewVm:
    """A VM whose guest echoes, or another."""

    def make(kernel: str = "foreign", program: str = "RE", **devices: Any) -> VM:
        return VM(VMConfig(kernel=guest(kernel), cmdline=program, memory_mib=MEMORY_MIB, accel="kvm", **devices))

    return make


# -- taken and restored ------------------------------------------------------------------------------------------------


async def test_a_vm_with_every_device_is_restored_and_leaves_nothing(
    new_vm: NewVm, every: dict[str, Any], holdings: Callable[..., Holdings]
) -> None:
    async with new_vm(**every) as vm:  # what a process keeps for good is made by its first VM
        await vm.boot()
        async with await vm.snapshot() as snapshot, await VM.restore(snapshot):
            pass
    before = holdings(MEMORY_MIB << 20)
    async with new_vm(**every) as vm:
        await vm.boot()
        async with await vm.snapshot() as snapshot:
            assert sorted(os.listdir(snapshot.path / "disks")) == ["own"]
            async with await VM.restore(snapshot) as first, await VM.restore(snapshot) as second:
                assert await echoed(first, b"first") == b"first"
                assert await echoed(second, b"second") == b"second"
                assert await echoed(vm, b"origin") == b"origin"
                assert list(second.ports) == ["console", "data"]
                with pytest.raises(StateError, match="no driver"):
                    await second.balloon.set(1)
    assert holdings(MEMORY_MIB << 20) == before


async def test_clones_go_on_writing_each_to_a_disk_of_its_own(new_vm: NewVm, image: Path) -> None:
    """The guest counts to REQUESTS, and goes on only if it reads back what it wrote."""
    drive = DriveConfig(path=image, id="disk", overlay=True, cache="unsafe")
    async with new_vm("virtio-disk", "", drives=[drive]) as vm, AsyncExitStack() as clones:
        await vm.boot()
        async with await vm.snapshot(then="stop") as snapshot:
            readers = [await heard(clones, snapshot) for _ in range(5)]
            said = [await everything(reader) for reader in readers]
    assert len(set(said)) == 1
    assert said[0] == bytes(range(said[0][0], REQUESTS + 1)) + END


async def test_what_devices_write_is_in_the_differences(new_vm: NewVm, image: Path, tmp_path: Path) -> None:
    """KVM's dirty log does not see it. At each moment a difference and all of memory are saved, and compared."""
    drive = DriveConfig(path=image, id="disk", overlay=True, cache="unsafe")
    async with new_vm("virtio-disk-long", "", drives=[drive], track_dirty=True) as vm:
        await vm.boot()
        await vm.pause()
        difference = full = await vm.snapshot(out=tmp_path / "full")
        for moment in range(4):
            await vm.resume()
            await anyio.sleep(0.002)
            if vm.state != "ready":
                break
            await vm.pause()
            difference = await vm.snapshot(out=tmp_path / f"difference{moment}", base=full)
            full = await vm.snapshot(out=tmp_path / f"full{moment}")
            assert await anyio.to_thread.run_sync(unlike, difference, full) == []
        async with full, AsyncExitStack() as clones:
            end = bytes([MANY_REQUESTS]) + struct.pack("<H", 2 * MANY_REQUESTS)
            await everything(await heard(clones, difference), end)


def unlike(one: Snapshot, other: Snapshot) -> list[str]:
    """Addresses of the pages that are not the same in both."""
    first, second = memory_of(one), memory_of(other)
    return [hex(place) for place in sorted(first.keys() | second.keys()) if first.get(place) != second.get(place)]


def memory_of(snapshot: Snapshot) -> dict[int, bytes]:
    """Its pages that are not all zeros, by offset."""
    pages: dict[int, bytes] = {}
    for layer in snapshot.loaded.layers:
        for start, size in layer.map.zero:
            for place in range(start, start + size, 4096):
                pages.pop(place, None)
        for start, size in layer.map.data:
            data = os.pread(layer.fd, size, start)
            pages.update((start + at, data[at : at + 4096]) for at in range(0, size, 4096))
    return {place: page for place, page in pages.items() if any(page)}


async def heard(clones: AsyncExitStack, snapshot: Snapshot) -> ConsoleReader:
    """A clone's console, from the first byte on; the clone is stopped with ``clones``."""
    readers: list[ConsoleReader] = []
    clone = await VM.restore(snapshot, prepare=lambda clone: readers.append(clone.console.subscribe()))
    await clones.enter_async_context(clone)
    return readers[0]


async def everything(reader: ConsoleReader, end: bytes = END) -> bytes:
    found = b""
    with anyio.fail_after(PATIENCE_S):
        while not found.endswith(end):
            found += await anext(reader)
    return found


async def test_a_snapshot_of_a_clone_needs_neither_the_first_one_nor_its_vm(
    new_vm: NewVm, image: Path, tmp_path: Path
) -> None:
    drive = DriveConfig(path=image, id="disk", overlay=True)
    async with new_vm(drives=[drive]) as vm:
        await vm.boot()
        (await vm.snapshot(out=tmp_path / "first")).close()
    async with await VM.restore(tmp_path / "first") as vm:
        (await vm.snapshot(out=tmp_path / "second")).close()
    os.rename(tmp_path / "first", tmp_path / "elsewhere")
    async with await VM.restore(tmp_path / "second") as vm:
        assert await echoed(vm, b"again") == b"again"


@pytest.mark.requires("passt")
async def test_a_clone_has_a_network_helper_of_its_own(new_vm: NewVm, holdings: Callable[..., Holdings]) -> None:
    async with new_vm(net=NetConfig(address="none")) as vm:
        await vm.boot()
        async with await vm.snapshot() as snapshot:
            gc.collect()  # a long session's garbage may hold descriptors that would go meanwhile
            before = holdings(MEMORY_MIB << 20)
            async with await VM.restore(snapshot) as clone:
                assert len(holdings().children - before.children) == 1
                assert clone.state == "ready"
            assert holdings(MEMORY_MIB << 20) == before


# -- refused -----------------------------------------------------------------------------------------------------------


async def test_a_disk_that_would_change_under_its_snapshot_is_refused_and_the_vm_runs_on(
    new_vm: NewVm, image: Path, tmp_path: Path
) -> None:
    async with new_vm(drives=[DriveConfig(path=image, id="plain")]) as vm:
        await vm.boot()
        with pytest.raises(SnapshotFailed, match="overlay=True or read_only=True"):
            await vm.snapshot(out=tmp_path / "s")
        assert vm.state == "ready"
        assert await echoed(vm, b"well") == b"well"
    assert not (tmp_path / "s").exists()


async def test_an_image_that_was_changed_is_refused(new_vm: NewVm, image: Path, tmp_path: Path) -> None:
    async with new_vm(drives=[DriveConfig(path=image, id="disk", overlay=True)]) as vm:
        await vm.boot()
        (await vm.snapshot(out=tmp_path / "s")).close()
    os.truncate(image, 1024)
    with pytest.raises(SnapshotMismatch, match="image"):
        await VM.restore(tmp_path / "s")


async def test_a_socket_that_the_original_has_is_refused_and_another_is_taken(
    new_vm: NewVm, tmp_path: Path, holdings: Callable[..., Holdings]
) -> None:
    async with new_vm(vsock=VsockConfig(uds_path=tmp_path / "v")) as vm:
        await vm.boot()
        async with await vm.snapshot() as snapshot:
            before = holdings(MEMORY_MIB << 20)
            with pytest.raises(Exception, match="uds_path"):
                await VM.restore(snapshot)
            assert holdings(MEMORY_MIB << 20) == before
            other = VsockConfig(uds_path=tmp_path / "w")
            async with await VM.restore(snapshot, configure=lambda c: attrs.evolve(c, vsock=other)) as clone:
                assert (tmp_path / "w").is_socket()
                assert clone.state == "ready"
    assert not (tmp_path / "w").exists()


async def test_a_disk_that_is_missing_from_a_snapshot_is_damage(new_vm: NewVm, image: Path, tmp_path: Path) -> None:
    async with new_vm(drives=[DriveConfig(path=image, id="disk", overlay=True)]) as vm:
        await vm.boot()
        (await vm.snapshot(out=tmp_path / "s")).close()
    (tmp_path / "s" / "disks" / "disk").unlink()
    with pytest.raises(SnapshotDamaged, match="disks/disk"):
        await VM.restore(tmp_path / "s")
