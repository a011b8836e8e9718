"""What a machine's devices stand on: refused before QEMU is started, held as long as it runs, and freed with it."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import ConfigError, DriveBusy, DriveError, MachineError, StateError
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.command import QemuBinary
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.machine.qemu.vhost_user.backend import Backend
from asyncvmm.storage.overlay import make_overlay
from asyncvmm.timing.timeline import Timeline
from tests.support.qemu_machine import DEBUG_EXIT, PATIENCE_S, SOME_TSC_KHZ, holdings, running, start_cancelled

pytestmark = pytest.mark.anyio


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk, or so.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def plan(toy_guest: Path, image: Path, tmp_path: Path) -> Iterator[BootPlan]:
    """A guest that looks at none of its devices."""
    ours, theirs = socket.socketpair()
    drive = DriveConfig(path=image, id="disk")
    devices = DeviceConfig(
        drives=(drive,),
        net=NetConfig(),
        balloon=BalloonConfig(mib=8),
        rng=RngConfig(),
        vsock=VsockConfig(uds_path=tmp_path / "vsock"),
        console=ConsoleConfig(ports=("bulk",)),
    )
    resources = Resources(drives=(DriveResource(drive, image),), net_fd=theirs.fileno(), mac="02:00:00:00:00:01")
    with ours, theirs:
        yield BootPlan(
            name="toy",
            memory_mib=32,
            vcpus=1,
            kernel=toy_guest,
            initrd=None,
            appended=b"x" * 100_000,
            tsc_khz=SOME_TSC_KHZ,
            devices=devices,
            resources=resources,
        )


def with_drive(plan: BootPlan, path: Path, **changes: bool) -> BootPlan:
    drive = DriveConfig(path=path, id="disk", **changes)  # type: ignore[arg-type]
    resources = attrs.evolve(plan.resources, drives=(DriveResource(drive, path),))
    return attrs.evolve(plan, devices=attrs.evolve(plan.devices, drives=(drive,)), resources=resources)


@pytest.mark.parametrize("tsc_khz", [SOME_TSC_KHZ, None], ids=["microvm", "q35"])
async def test_a_machine_with_every_device_starts_and_leaves_nothing(
    plan: BootPlan, qemu: QemuBinary, tsc_khz: int | None
) -> None:
    before = holdings()
    async with running(attrs.evolve(plan, tsc_khz=tsc_khz), qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        assert list(machine.ports) == ["console", "bulk"]
    assert not holdings() - before


async def test_as_many_devices_as_can_be_asked_for_fit(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    resources = []
    for index in range(8):
        path = tmp_path / f"disk{index}"
        path.write_bytes(bytes(4096))
        resources.append(DriveResource(DriveConfig(path=path, id=f"drive{index}"), path))
    devices = attrs.evolve(
        plan.devices,
        drives=tuple(resource.config for resource in resources),
        console=ConsoleConfig(ports=tuple(f"port{index}" for index in range(15))),
    )
    plan = attrs.evolve(plan, devices=devices, resources=attrs.evolve(plan.resources, drives=tuple(resources)))
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        assert len(machine.ports) == 16


async def test_a_guest_that_ended_leaves_nothing_and_its_ports_are_at_their_end(
    plan: BootPlan, qemu: QemuBinary
) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        waiting = asyncio.ensure_future(machine.ports["bulk"].receive())
        await machine.write("console", DEBUG_EXIT)
        await witness.until_stopped()
        with anyio.fail_after(PATIENCE_S), pytest.raises(anyio.EndOfStream):
            await waiting
        del waiting
        assert machine.vsock is not None
        with pytest.raises(StateError):
            await machine.vsock.connect(1)
        with pytest.raises(anyio.BrokenResourceError):
            await machine.ports["console"].send(b"x")
        assert machine.balloon is not None
        with pytest.raises(StateError, match="running guest"):
            await machine.balloon.actual_pages()
    assert not holdings() - before


async def test_a_port_can_be_given_up_while_the_guest_runs(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, witness):
        await machine.ports["bulk"].aclose()
        await machine.write("console", b"on it goes\n")
        await witness.until_said("console", b"ON IT GOES\n")


async def test_a_guest_without_a_balloon_driver_is_told_from_one_that_has_it(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(plan, qemu) as (machine, _):
        assert machine.balloon is not None
        assert await machine.balloon.actual_pages() == 0
        with pytest.raises(StateError, match="driver"):
            await machine.balloon.stats()
        with pytest.raises(StateError, match="driver"):
            await machine.balloon.set_target_pages(1)
        with pytest.raises(StateError, match="migrate"):
            await machine.balloon.hint_free_pages()


async def test_without_devices_there_is_nothing_to_hand_out(plan: BootPlan, qemu: QemuBinary) -> None:
    async with running(attrs.evolve(plan, devices=DeviceConfig(), resources=Resources()), qemu) as (machine, _):
        assert (machine.balloon, machine.ports, machine.vsock) == (None, {}, None)


def missing(path: Path) -> None:
    path.unlink()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def character_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (missing, "No such file"),
        (directory, "directory"),
        (fifo, "neither"),
        (empty, "empty"),
        (character_device, "neither"),
    ],
)
async def test_a_drive_that_is_none_is_refused_with_what_was_found(
    plan: BootPlan, qemu: QemuBinary, image: Path, spoil: Callable[[Path], None], found: str
) -> None:
    before = holdings()
    spoil(image)
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    with pytest.raises(DriveError, match=re.escape(found)):
        await machine.start()
    assert not holdings() - before


async def test_a_unix_socket_that_cannot_be_is_refused(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    before = holdings()
    devices = attrs.evolve(plan.devices, vsock=VsockConfig(uds_path=tmp_path / "nowhere" / "vsock"))
    machine = QemuMachine(attrs.evolve(plan, devices=devices), Timeline(), lambda _: None, qemu=qemu)
    with pytest.raises(ConfigError, match="nowhere"):
        await machine.start()
    assert not holdings() - before


async def test_two_machines_cannot_have_one_unix_socket(plan: BootPlan, qemu: QemuBinary, tmp_path: Path) -> None:
    without = attrs.evolve(plan, devices=attrs.evolve(plan.devices, drives=()), resources=Resources(net_fd=None))
    without = attrs.evolve(without, devices=attrs.evolve(without.devices, net=None))
    path = tmp_path / "vsock"
    async with running(without, qemu):
        with pytest.raises(ConfigError, match="in use"):
            await QemuMachine(without, Timeline(), lambda _: None, qemu=qemu).start()
        assert path.is_socket(), "it is the first one's"
    assert not path.exists()


async def test_an_image_has_one_writer_or_many_readers(plan: BootPlan, qemu: QemuBinary, image: Path) -> None:
    plan = attrs.evolve(plan, devices=attrs.evolve(plan.devices, vsock=None))
    reader = with_drive(plan, image, read_only=True)
    async with running(plan, qemu):
        for other in (plan, reader):
            with pytest.raises(DriveBusy):
                await QemuMachine(other, Timeline(), lambda _: None, qemu=qemu).start()
    async with running(reader, qemu), running(reader, qemu):
        with pytest.raises(DriveBusy):
            await QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu).start()
    async with running(plan, qemu) as (_, witness):
        await witness.until_said("control", b"hello control\n")


async def test_an_overlay_is_what_the_guest_has_and_its_base_stays_shared(
    plan: BootPlan, qemu: QemuBinary, image: Path
) -> None:
    overlays = [await anyio.to_thread.run_sync(lambda: make_overlay(image, None, for_qemu=True)) for _ in range(2)]
    drive = DriveConfig(path=image, id="disk", overlay=True)
    plans = []
    for overlay in overlays:
        assert overlay.path is not None
        assert overlay.format != "mapped"
        resources = attrs.evolve(plan.resources, drives=(DriveResource(drive, overlay.path, overlay.format),))
        devices = attrs.evolve(plan.devices, drives=(drive,), vsock=None)
        plans.append(attrs.evolve(plan, devices=devices, resources=resources))
    try:
        async with running(plans[0], qemu) as (_, first), running(plans[1], qemu) as (_, second):
            await first.until_said("control", b"hello control\n")
            await second.until_said("control", b"hello control\n")
    finally:
        for overlay in overlays:
            overlay.remove()


async def test_an_overlay_of_no_name_has_none_once_qemu_has_it(plan: BootPlan, qemu: QemuBinary, image: Path) -> None:
    overlay = await anyio.to_thread.run_sync(lambda: make_overlay(image, None, for_qemu=True))
    assert overlay.path is not None
    drive = DriveConfig(path=image, id="disk", overlay=True)
    resource = DriveResource(drive, overlay.path, overlay.format, overlay)
    devices = attrs.evolve(plan.devices, drives=(drive,))
    plan = attrs.evolve(plan, devices=devices, resources=attrs.evolve(plan.resources, drives=(resource,)))
    async with running(plan, qemu) as (_, witness):
        await witness.until_said("control", b"hello control\n")
        assert not overlay.path.exists(), "killed, we leave nothing behind"
    overlay.remove()


@pytest.mark.parametrize("delay_s", [0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.1])
async def test_a_start_cancelled_at_some_moment_leaves_nothing(
    plan: BootPlan, qemu: QemuBinary, delay_s: float
) -> None:
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    with anyio.move_on_after(delay_s):
        await machine.start()
    await machine.stop()
    assert not holdings() - before


@pytest.mark.parametrize("turns", range(12))
async def test_a_start_cancelled_by_its_task_leaves_nothing(plan: BootPlan, qemu: QemuBinary, turns: int) -> None:
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    await start_cancelled(machine, turns)
    await machine.stop()
    assert not holdings() - before


async def test_a_stop_while_drives_are_being_opened_leaves_nothing(plan: BootPlan, qemu: QemuBinary) -> None:
    before = holdings()
    machine = QemuMachine(plan, Timeline(), lambda _: None, qemu=qemu)
    task = asyncio.ensure_future(machine.prepare())
    await anyio.lowlevel.checkpoint()
    await machine.stop()
    with suppress(StateError):
        await task
    del task
    assert not holdings() - before


def wrong(*_: object) -> Any:
    raise RuntimeError("wrong")


async def test_a_device_of_ours_that_is_wrong_ends_the_guest_with_its_reason(
    plan: BootPlan, qemu: QemuBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = holdings()
    async with running(plan, qemu) as (machine, witness):
        await witness.until_said("control", b"hello control\n")
        monkeypatch.setattr(Backend, "kick", wrong)
        assert machine._attachments.vsock is not None
        machine._attachments.vsock._server.work(0)
        stopped = await witness.until_stopped()
        assert (stopped.reason, stopped.detail) == ("machine", "device: RuntimeError: wrong")
    assert not holdings() - before


async def test_a_device_of_ours_that_is_wrong_at_the_start_is_what_the_start_says(
    plan: BootPlan, qemu: QemuBinary, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = holdings()
    monkeypatch.setattr(Backend, "handle", wrong)
    with pytest.raises(MachineError, match="device: RuntimeError: wrong") as caught:
        async with running(plan, qemu):
            pass
    assert not caught.value.retryable
    del caught
    assert not holdings() - before
