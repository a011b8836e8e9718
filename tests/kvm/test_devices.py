"""A VM with devices on /dev/kvm, whose tiny guest has drivers for one of them at most: made, kept for later, let go."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import MAX_DRIVES, ConsoleConfig, DriveConfig, NetConfig, RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.rng import VirtioRng
from asyncvmm.errors import AsyncVMMError, ConfigError, DriveBusy, DriveError, HostError, StateError, VsockConnectError
from asyncvmm.machine.kvm.devices import DeviceSet
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.virtio import VirtioSlot
from asyncvmm.metrics.groups import EntropyMetrics
from asyncvmm.x86.layout import MMIO_SIZE
from tests.support.holdings import Holdings

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from asyncvmm.vsock.of_vm import Vsock
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that no other mapping has."""

DRIVER_OK = 0x0F
NAMES = ["blk-image", "blk-drive1", "rng", "console", "vsock", "balloon"]

NewVm = Callable[..., VM]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the VM's images and sockets are."""
    for name in ("image", "plain"):
        (tmp_path / name).write_bytes(name.encode() * 65536)
    return tmp_path


@pytest.fixture
def every(place: Path) -> dict[str, Any]:
    """Every device that needs no helper."""
    return {
        "drives": [DriveConfig(path=place / "image", id="image", overlay=True), place / "plain"],
        "balloon": True,
        "vsock": VsockConfig(uds_path=place / "vsock"),
        "rng": True,
        "virtio_console": ConsoleConfig(ports=("data",)),
    }


@pytest.fixture
def new_vm(guest: Callable[[str], Path]) -> NewVm:
    """A VM whose guest is ready at once and then waits for ever, or does what ``program`` says."""

    def make(program: str = "RE", **devices: Any) -> VM:
        return VM(
            VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=MEMORY_MIB, accel="kvm", **devices),
        )

    return make


def device_set(vm: VM) -> DeviceSet:
    machine = vm._machine
    assert isinstance(machine, KvmMachine)
    assert machine._devices is not None
    return machine._devices


# -- from the start to the end -----------------------------------------------------------------------------------------


async def test_a_vm_with_every_device_runs_and_leaves_nothing(
    new_vm: NewVm, every: dict[str, Any], place: Path, holdings: Callable[..., Holdings]
) -> None:
    async with new_vm(**every) as vm:  # what a process keeps for good is made by its first VM
        await vm.boot()
    before, image = holdings(MEMORY_MIB << 20), (place / "image").read_bytes()
    async with new_vm(**every) as vm:
        await vm.boot()
        assert [slot.name for slot in device_set(vm).slots] == NAMES
        assert list(vm.ports) == ["console", "data"]
        assert vm.vsock is not None
        assert sorted(os.listdir(place)) == ["TMPDIR", "image", "plain", "vsock"]
        with pytest.raises(StateError, match="no driver"):
            await vm.balloon.set(1)
    assert holdings(MEMORY_MIB << 20) == before
    assert sorted(os.listdir(place)) == ["TMPDIR", "image", "plain"]
    assert (place / "image").read_bytes() == image


async def test_a_guest_that_ends_itself_leaves_nothing_either(
    new_vm: NewVm, every: dict[str, Any], holdings: Callable[..., Holdings]
) -> None:
    async with new_vm("RWO", **every) as vm:
        await vm.boot()
    before = holdings(MEMORY_MIB << 20)
    async with new_vm("RWO", **every) as vm:
        await vm.boot()
        await vm.console.write(b"!")
        assert await vm.events.stopped == "shutdown"
    assert holdings(MEMORY_MIB << 20) == before


async def test_as_many_devices_as_can_be_asked_for_have_their_places(
    new_vm: NewVm, every: dict[str, Any], place: Path
) -> None:
    images = [place / f"image{index}" for index in range(MAX_DRIVES)]
    for path in images:
        path.write_bytes(bytes(4096))
    async with new_vm(**{**every, "drives": images}) as vm:
        await vm.boot()
        places = [slot.place for slot in device_set(vm).slots]
    assert len({found.address for found in places}) == len({found.gsi for found in places}) == MAX_DRIVES + 4


async def test_a_device_that_fails_at_its_guests_end_keeps_nothing(
    new_vm: NewVm,
    every: dict[str, Any],
    holdings: Callable[..., Holdings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(index: int) -> bool:
        raise ZeroDivisionError

    async with new_vm(**every) as vm:
        await vm.boot()
    before = holdings(MEMORY_MIB << 20)
    async with new_vm(**every) as vm:
        await vm.boot()
        for slot in device_set(vm).slots:
            monkeypatch.setattr(slot.transport, "kick", fail)
    assert "ZeroDivisionError" in caplog.text
    assert holdings(MEMORY_MIB << 20) == before


@pytest.mark.parametrize("program", ["RE", "RWO"])
async def test_devices_of_a_vm_that_has_stopped_say_so(new_vm: NewVm, every: dict[str, Any], program: str) -> None:
    async with new_vm(program, **every) as vm:
        await vm.boot()
        vsock, port = vm.vsock, vm.ports["data"]
        if program == "RWO":
            await vm.console.write(b"!")
            await vm.events.stopped
            await refused_by_all(vm, vsock, port)
    await refused_by_all(vm, vsock, port)
    assert vm.metrics.flush().groups["balloon"]["inflate_count"] == 0


async def refused_by_all(vm: VM, vsock: Vsock, port: ByteStream) -> None:
    with anyio.fail_after(10):
        for call in (lambda: vm.balloon.set(1), lambda: vm.balloon.stats(), lambda: vsock.connect(1)):
            with pytest.raises((StateError, VsockConnectError)):
                await call()
        with pytest.raises((anyio.EndOfStream, anyio.ClosedResourceError)):
            await port.receive()
        with pytest.raises((anyio.BrokenResourceError, anyio.ClosedResourceError)):
            await port.send(b"x")


@pytest.mark.requires("passt")
async def test_the_network_helper_ends_with_its_vm(new_vm: NewVm, holdings: Callable[..., Holdings]) -> None:
    async with new_vm(net="user") as vm:
        await vm.boot()
    before = holdings(MEMORY_MIB << 20)
    async with new_vm(net=NetConfig(address="none")) as vm:
        timing = await vm.boot()
        assert timing.gvproxy_start_ms is not None
        assert len(holdings().children - before.children) == 1
    assert holdings(MEMORY_MIB << 20) == before


async def test_vms_with_devices_run_side_by_side(new_vm: NewVm, place: Path) -> None:
    drive = DriveConfig(path=place / "image", overlay=True)
    async with new_vm(drives=[drive], rng=True) as first, new_vm(drives=[drive], rng=True) as second:
        await first.boot()
        await second.boot()
        assert first.state == second.state == "ready"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overlay"),
    [("nosuch", False), ("nosuch", True), ("directory", False), ("directory", True), ("empty", True)],
)
async def test_a_drive_that_cannot_be_used_is_refused_before_there_is_a_vm(
    new_vm: NewVm, place: Path, holdings: Callable[..., Holdings], name: str, overlay: bool
) -> None:
    (place / "empty").touch()
    (place / "directory").mkdir()
    before = holdings(MEMORY_MIB << 20)
    vm = new_vm(drives=[place / "plain", DriveConfig(path=place / name, overlay=overlay)])
    with pytest.raises((DriveError, ConfigError), match=r"drive|overlay"):
        await vm.boot()
    assert vm.state == "failed"
    assert "vm_create" not in {phase.name for phase in vm.timeline.phases}
    assert holdings(MEMORY_MIB << 20) == before


async def test_one_image_has_one_writer(new_vm: NewVm, place: Path) -> None:
    async with new_vm(drives=[place / "plain"]) as first:
        await first.boot()
        with pytest.raises(DriveBusy, match="plain in use"):
            await new_vm(drives=[place / "plain"]).boot()
        with pytest.raises(DriveBusy, match="plain in use"):
            await new_vm(drives=[DriveConfig(path=place / "plain", read_only=True)]).boot()
        with pytest.raises(DriveBusy, match="plain in use"):
            await new_vm(drives=[DriveConfig(path=place / "plain", overlay=True)]).boot()
        assert first.state == "ready"
    async with new_vm(drives=[place / "plain"]) as later:
        await later.boot()


async def test_one_image_has_many_readers(new_vm: NewVm, place: Path) -> None:
    reader = DriveConfig(path=place / "plain", read_only=True)
    async with new_vm(drives=[reader]) as first, new_vm(drives=[reader]) as second:
        await first.boot()
        await second.boot()
        with pytest.raises(DriveBusy, match="plain in use"):
            await new_vm(drives=[place / "plain"]).boot()


async def test_a_vm_does_not_write_one_image_as_two_drives(new_vm: NewVm, place: Path) -> None:
    with pytest.raises(DriveBusy, match="plain in use"):
        await new_vm(drives=[place / "plain", place / "plain"]).boot()


@pytest.mark.parametrize("name", ["nosuch/socket", "plain"])
async def test_a_socket_that_cannot_be_is_refused_and_leaves_nothing(
    new_vm: NewVm, every: dict[str, Any], place: Path, holdings: Callable[..., Holdings], name: str
) -> None:
    async with new_vm(**every) as vm:
        await vm.boot()
    before = holdings(MEMORY_MIB << 20)
    vm = new_vm(**{**every, "vsock": VsockConfig(uds_path=place / name)})
    with pytest.raises(ConfigError, match="uds_path"):
        await vm.boot()
    assert "vcpu_start" not in {phase.name for phase in vm.timeline.phases}
    assert holdings(MEMORY_MIB << 20) == before
    assert (place / "plain").is_file()


@pytest.fixture
def two_descriptors() -> Iterator[None]:
    """No more than two descriptors are left to this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as undo:
        undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, before[1]))
        taken = list(iter(try_to_open, -1))
        for _ in range(2):
            os.close(taken.pop())
        for fd in taken:
            undo.callback(os.close, fd)
        yield


def try_to_open() -> int:
    try:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def test_a_device_without_descriptors_is_refused_and_keeps_none(two_descriptors: None) -> None:
    device = VirtioRng(RngConfig(), os.urandom, EntropyMetrics(), clock_ns=lambda: 0, later=lambda *_: None)
    for _ in range(2):
        with pytest.raises(HostError, match="3 free descriptors"):
            VirtioSlot(0, device, GuestView(()), memoryview(bytearray(MMIO_SIZE)), "rng")
    fds = [try_to_open() for _ in range(2)]
    assert -1 not in fds
    for fd in fds:
        os.close(fd)


# -- what a snapshot keeps ---------------------------------------------------------------------------------------------


async def test_the_state_of_every_device_is_json_and_each_can_become_it(new_vm: NewVm, every: dict[str, Any]) -> None:
    async with new_vm(**every) as vm:
        await vm.boot()
        await vm.pause()
        state = await device_set(vm).state()
        assert list(state) == NAMES
        kept = json.loads(json.dumps(state))
        assert kept == state
    async with new_vm(**every) as vm:
        await vm.boot()
        await vm.pause()
        for slot in device_set(vm).slots:
            with slot.lock:
                slot.transport.restore(kept[slot.name])
        assert await device_set(vm).state() == kept


async def test_a_device_that_was_driven_becomes_what_it_was(boot: Boot) -> None:
    """In a machine of the same memory, where its rings are."""
    rng = DeviceConfig(rng=RngConfig())
    async with boot("virtio-event-idx", devices=rng) as run:
        await run.end()
        assert run.machine._devices is not None
        state = json.loads(json.dumps(await run.machine._devices.state()))
    assert state["rng"]["status"] == DRIVER_OK
    (queue,) = state["rng"]["queues"]
    assert queue["ready"]
    async with boot("output", devices=rng) as run:
        assert run.machine._devices is not None
        (slot,) = run.machine._devices.slots
        with slot.lock:
            slot.transport.restore(state["rng"])
            assert slot.transport.state()["status"] & DRIVER_OK == DRIVER_OK


async def test_a_state_of_another_device_is_refused(new_vm: NewVm, every: dict[str, Any]) -> None:
    async with new_vm(**every) as vm:
        await vm.boot()
        state = await device_set(vm).state()
        first, *_, last = device_set(vm).slots
        with first.lock, pytest.raises(AsyncVMMError, match="saved device id"):
            first.transport.restore(state[last.name])
