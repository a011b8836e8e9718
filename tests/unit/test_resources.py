"""What devices stand on, made for real: overlay files, a network helper, a TAP; and all of it freed, also half-way."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm.device_config import DriveConfig, NetConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import ConfigError, DriveError, HostError, SnapshotMismatch, TapError
from asyncvmm.machine.base import AccelName
from asyncvmm.net.mac import parse_mac
from asyncvmm.resources import HostResources, SavedResources
from asyncvmm.storage.snapshot import save_drives
from asyncvmm.timing.timeline import Timeline
from tests.support.device_rig import Folder
from tests.support.holdings import Holdings
from tests.support.requirements import require

pytestmark = pytest.mark.anyio

MIB = 1 << 20
TAP = "asyncvmmtest"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"base" * (MIB // 4))
    return path


@pytest.fixture
async def resources(temporary_directory: Path) -> AsyncIterator[HostResources]:
    found = HostResources()
    yield found
    await found.aclose()


async def make_ready(resources: HostResources, accel: AccelName = "kvm", **devices: object) -> Timeline:
    timeline = Timeline()
    await resources.make_ready(DeviceConfig(**devices), accel, timeline)  # type: ignore[arg-type]
    return timeline


def phases(timeline: Timeline) -> list[str]:
    return [phase.name for phase in timeline.phases]


def files(directory: Path) -> list[str]:
    return os.listdir(directory)


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


# -- drives ------------------------------------------------------------------------------------------------------------


async def test_nothing_asked_for_is_nothing_made(resources: HostResources) -> None:
    timeline = await make_ready(resources)
    assert (resources.record.drives, resources.record.net_fd, resources.record.mac) == ((), None, None)
    assert not phases(timeline)


async def test_a_drive_without_an_overlay_is_its_image(resources: HostResources, image: Path) -> None:
    timeline = await make_ready(resources, drives=(DriveConfig(path=image),))
    (drive,) = resources.record.drives
    assert (drive.path, drive.format, drive.overlay) == (image, "raw", None)
    assert not phases(timeline), "there is nothing to time"


async def test_an_overlay_for_kvm_has_no_name_and_is_timed(
    resources: HostResources, image: Path, temporary_directory: Path
) -> None:
    drives = (DriveConfig(path=image), DriveConfig(path=image, overlay=True))
    timeline = await make_ready(resources, drives=drives)
    plain, drive = resources.record.drives
    assert plain.overlay is None
    assert drive.overlay is not None
    assert drive.overlay.path is None
    assert drive.path == image
    assert not files(temporary_directory)
    assert phases(timeline) == ["overlay"]


async def test_an_overlay_for_qemu_is_a_file_that_goes_with_the_vm(
    resources: HostResources, image: Path, temporary_directory: Path
) -> None:
    await make_ready(resources, "qemu", drives=(DriveConfig(path=image, overlay=True),))
    (drive,) = resources.record.drives
    assert files(temporary_directory) == [drive.path.name]
    assert drive.path != image
    await resources.aclose()
    assert not files(temporary_directory)


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
async def test_an_overlay_at_a_place_of_its_own_stays(
    resources: HostResources, image: Path, tmp_path: Path, accel: AccelName
) -> None:
    kept = tmp_path / "kept"
    await make_ready(resources, accel, drives=(DriveConfig(path=image, overlay=kept),))
    assert resources.record.drives[0].path == kept
    await resources.aclose()
    assert kept.exists()


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
async def test_what_a_snapshot_has_of_a_drive_is_an_overlay_that_goes_with_the_vm(
    holdings: Callable[..., Holdings], resources: HostResources, image: Path, tmp_path: Path, accel: AccelName
) -> None:
    drives = (DriveConfig(path=image, id="disk", overlay=True), DriveConfig(path=image, id="read", read_only=True))
    await make_ready(resources, accel, drives=drives)
    folder = Folder(tmp_path / "snapshot")
    saved = SavedResources(drives=await save_drives(resources.record, folder), open_file=folder.open_file)
    before = holdings()
    clone, timeline = HostResources(), Timeline()
    await clone.make_ready(DeviceConfig(drives=drives), accel, timeline, saved)
    overlay, plain = clone.record.drives
    assert overlay.overlay is not None
    assert (overlay.overlay.how, overlay.overlay.temporary, plain.overlay) == ("saved", True, None)
    assert phases(timeline) == ["overlay"]
    await clone.aclose()
    assert holdings() == before


async def test_drives_that_are_no_longer_what_they_were_leave_nothing(
    holdings: Callable[..., Holdings], resources: HostResources, image: Path, tmp_path: Path
) -> None:
    drives = (DriveConfig(path=image, id="disk", overlay=True), DriveConfig(path=image, id="read", read_only=True))
    await make_ready(resources, drives=drives)
    folder = Folder(tmp_path / "snapshot")
    kept = await save_drives(resources.record, folder)
    kept[1]["size"] += 1
    before, clone = holdings(), HostResources()
    saved = SavedResources(drives=kept, open_file=folder.open_file)
    with pytest.raises(SnapshotMismatch, match="image"):
        await clone.make_ready(DeviceConfig(drives=drives), "kvm", Timeline(), saved)
    await clone.aclose()
    assert holdings() == before


@pytest.mark.requires("passt")
async def test_a_restored_card_has_the_address_that_it_had(resources: HostResources) -> None:
    mac = "02:00:00:00:00:07"
    saved = SavedResources(drives=[], open_file=lambda name: -1, mac=mac)
    await resources.make_ready(DeviceConfig(net=NetConfig()), "kvm", Timeline(), saved)
    assert resources.record.mac == mac


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
async def test_a_second_drive_that_cannot_be_had_leaves_nothing_of_the_first(
    holdings: Callable[..., Holdings], image: Path, accel: AccelName
) -> None:
    before = holdings()
    found = HostResources()
    drives = (
        DriveConfig(path=image, overlay=True),
        DriveConfig(path=image.with_name("nosuch"), id="second", overlay=True),
    )
    with pytest.raises(DriveError, match=r"^drive second: .*nosuch"):
        await make_ready(found, accel, drives=drives)
    await found.aclose()
    assert holdings() == before


async def test_an_overlay_that_cannot_be_removed_keeps_nothing_else(
    resources: HostResources, image: Path, temporary_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    drives = (DriveConfig(path=image, overlay=True), DriveConfig(path=image, overlay=True))
    await make_ready(resources, "qemu", drives=drives)
    last = resources.record.drives[1].path
    last.unlink()
    last.mkdir()
    with caplog.at_level(logging.ERROR):
        await resources.aclose()
    assert files(temporary_directory) == [last.name]
    assert f"the overlay {last} stays" in caplog.text


async def test_freeing_twice_frees_once(resources: HostResources, image: Path) -> None:
    await make_ready(resources, "qemu", drives=(DriveConfig(path=image, overlay=True),))
    await resources.aclose()
    await resources.aclose()


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["passt", "gvproxy"])
def helper(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One helper after the other, alone on PATH with what starts it."""
    name = str(request.param)
    require(name)
    for program in ("setpriv", name):
        if found := shutil.which(program):
            (tmp_path / program).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    return name


async def test_a_user_network_is_a_helper_that_ends_with_the_vm(resources: HostResources, helper: str) -> None:
    timeline = await make_ready(resources, net=NetConfig())
    record = resources.record
    assert record.net_fd is not None
    assert record.mac is not None
    assert parse_mac(record.mac)
    assert phases(timeline) == ["network_helper"]
    os.fstat(record.net_fd)
    await resources.aclose()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(record.net_fd)


async def test_a_network_that_cannot_be_had_leaves_nothing_of_the_drives(
    holdings: Callable[..., Holdings], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = holdings()
    monkeypatch.setenv("PATH", str(tmp_path))
    found = HostResources()
    with pytest.raises(HostError, match="passt"):
        await make_ready(found, "qemu", drives=(DriveConfig(path=image, overlay=True),), net=NetConfig())
    await found.aclose()
    assert holdings() == before


@pytest.mark.requires("passt")
async def test_addresses_that_do_not_go_together_are_refused_before_a_helper_is_started(
    resources: HostResources,
) -> None:
    with pytest.raises(ConfigError, match="gateway"):
        await make_ready(resources, net=NetConfig(address="10.0.0.5/24", gateway="192.168.0.1"))


@pytest.mark.requires("passt")
@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.003, 0.01, 0.03])
async def test_making_ready_can_be_cancelled_at_any_moment(
    holdings: Callable[..., Holdings], image: Path, delay_s: float
) -> None:
    before = holdings()
    found = HostResources()
    drives = (DriveConfig(path=image, overlay=True),)
    making = asyncio.create_task(make_ready(found, "qemu", drives=drives, net=NetConfig()))
    await anyio.sleep(delay_s)
    making.cancel()
    await asyncio.wait([making])
    await found.aclose()
    assert holdings() == before


@pytest.mark.requires("tun")
async def test_a_tap_is_opened_and_goes_with_the_vm(resources: HostResources) -> None:
    timeline = await make_ready(resources, net=NetConfig(mode="tap", tap=TAP, mac="02:00:00:00:00:05"))
    assert TAP in interfaces()
    assert resources.record.mac == "02:00:00:00:00:05"
    assert not phases(timeline)
    await resources.aclose()
    assert TAP not in interfaces()


@pytest.mark.requires("tun")
async def test_a_tap_that_somebody_has_is_refused(resources: HostResources) -> None:
    net = NetConfig(mode="tap", tap=TAP)
    await make_ready(resources, net=net)
    other = HostResources()
    with pytest.raises(TapError, match=TAP):
        await make_ready(other, net=net)
    await other.aclose()
