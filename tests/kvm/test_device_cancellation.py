"""As test_cancellation.py, for a VM with devices: all they stand on and hold is freed, also files and sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, AsyncVMMError, VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, VsockConfig
from tests.support.cancelling import DELAYS_S, cancel_after, cancel_at_phase
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that no other mapping has."""

DEVICE_PHASES = ("overlay", "device_open", "device_fit", "device_attach")
OTHER_PHASES = ("total", "setup", "boot", "memory", "vm_create", "kernel_load", "vcpu_start", "boot_wait")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the VM's images and sockets are."""
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    (tmp_path / "plain").write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.fixture
def new_vm(guest: Callable[[str], Path], place: Path) -> Callable[..., VM]:
    """A VM with every device that needs no helper, whose guest never is ready unless the program says so."""

    def make(program: str = "H") -> VM:
        vm = VM(
            VMConfig(
                kernel=guest("foreign"),
                cmdline=program,
                memory_mib=MEMORY_MIB,
                accel="kvm",
                drives=[DriveConfig(path=place / "image", overlay=True), DriveConfig(path=place / "plain")],
                balloon=BalloonConfig(mib=1, stats_interval_s=1),
                vsock=VsockConfig(uds_path=place / "vsock"),
                rng=True,
                virtio_console=ConsoleConfig(ports=("data",)),
            )
        )
        vm.stream_to(place / "events.jsonl")
        return vm

    return make


async def warm_up(new_vm: Callable[..., VM]) -> None:
    """What a process keeps for good (modules, caches, worker threads) is made by its first VM."""
    async with new_vm("RE") as vm:
        await vm.boot()


def now(place: Path) -> tuple[Holdings, list[str]]:
    """What the process holds, and the files beside the images."""
    return Holdings.now(MEMORY_MIB << 20), sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("phase", DEVICE_PHASES + OTHER_PHASES)
async def test_a_boot_cancelled_as_a_phase_begins_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, place: Path, phase: str
) -> None:
    await warm_up(new_vm)
    before = now(place)
    vm = new_vm()
    assert await cancel_at_phase(vm, phase), "no such phase"
    assert vm.state == "stopped"
    assert now(place) == before


@pytest.mark.parametrize("delay_s", DELAYS_S)
async def test_a_boot_cancelled_at_some_moment_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, place: Path, delay_s: float
) -> None:
    await warm_up(new_vm)
    before = now(place)
    assert not await cancel_after(new_vm(), delay_s)
    assert now(place) == before


@pytest.mark.parametrize("program", ["T", "PH", "X"])
async def test_a_boot_that_fails_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, place: Path, program: str
) -> None:
    await warm_up(new_vm)
    before = now(place)
    with pytest.raises(AsyncVMMError):
        await new_vm(program).boot()
    assert now(place) == before


async def test_a_drive_that_another_vm_has_fails_the_boot_and_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, place: Path
) -> None:
    async with new_vm("RE") as first:
        await first.boot()
        before = now(place)
        with pytest.raises(AsyncVMMError):
            await new_vm("RE").boot()
        assert now(place) == before


@pytest.mark.parametrize("what", ["connect", "accept", "port"])
async def test_cancelling_what_waits_for_the_guests_drivers_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, place: Path, what: str
) -> None:
    await warm_up(new_vm)
    before = now(place)

    async def accept(vm: VM) -> None:
        async with vm.vsock.listen(7) as listener:
            await listener.accept()

    calls: dict[str, Callable[[VM], Any]] = {
        "connect": lambda vm: vm.vsock.connect(7),
        "accept": accept,
        "port": lambda vm: vm.ports["data"].receive(),
    }
    async with new_vm("RE") as vm:
        await vm.boot()
        for delay_s in (0, 0.001, 0.01):
            with anyio.move_on_after(delay_s):
                await calls[what](vm)
    assert now(place) == before
