"""A boot on /dev/kvm, cancelled or failed at any moment, leaves no thread, descriptor, mapping, child or file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from asyncvmm import VM, AsyncVMMError, VMConfig
from tests.support.cancelling import DELAYS_S, cancel_after, cancel_at_phase
from tests.support.holdings import Holdings

pytestmark = pytest.mark.anyio

MEMORY_MIB = 67
"""A size that no other mapping has."""

PHASES = ("total", "accel", "setup", "machine_import", "plan", "boot", "boot_wait")
KVM_PHASES = (
    *("kernel_asset_read", "rootfs_asset_open", "layout", "kvm_open", "vm_create", "irqchip_create"),
    *("memory", "memory_alloc", "memory_register", "vcpu_create"),
    *("kvm_create_vm", "vm_arch_setup", "rootfs_load", "kernel_load", "boot_params", "vm_finish"),
    *("vcpu_config", "cpuid_config", "register_config", "vcpu_start"),
)


@pytest.fixture
def new_vm(guest: Callable[[str], Path], tmp_path: Path) -> Callable[..., VM]:
    """A VM with everything it can have, whose guest never is ready unless the program says so."""
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(4096))

    def make(program: str = "H") -> VM:
        vm = VM(
            VMConfig(
                kernel=guest("foreign"), initrd=initrd, cmdline=program, memory_mib=MEMORY_MIB, vcpus=2, accel="kvm"
            )
        )
        vm.stream_to(tmp_path / "events.jsonl")
        return vm

    return make


async def warm_up(new_vm: Callable[..., VM]) -> None:
    """What a process keeps for good (modules, caches, worker threads) is made by its first VM."""
    async with new_vm("RE") as vm:
        await vm.boot()


def now() -> Holdings:
    return Holdings.now(MEMORY_MIB << 20)


@pytest.mark.parametrize("phase", PHASES + KVM_PHASES)
async def test_a_boot_cancelled_as_a_phase_begins_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, phase: str
) -> None:
    await warm_up(new_vm)
    before = now()
    vm = new_vm()
    assert await cancel_at_phase(vm, phase), "no such phase"
    assert vm.state == "stopped"
    assert now() == before


async def test_the_phases_cancelled_here_are_all_there_are(new_vm: Callable[..., VM]) -> None:
    async with new_vm("RE") as vm:
        await vm.boot()
        phases = {phase.name for phase in vm.timeline.phases}
    assert phases == {*PHASES, *KVM_PHASES}


@pytest.mark.parametrize("delay_s", DELAYS_S)
async def test_a_boot_cancelled_at_some_moment_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, delay_s: float
) -> None:
    await warm_up(new_vm)
    before = now()
    vm = new_vm()
    assert not await cancel_after(vm, delay_s)
    assert now() == before


@pytest.mark.parametrize("program", ["T", "PH", "PX", "O"])
async def test_a_boot_that_fails_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, program: str
) -> None:
    await warm_up(new_vm)
    before = now()
    vm = new_vm(program)
    with pytest.raises(AsyncVMMError):
        await vm.boot()
    assert now() == before


async def test_an_exception_in_the_block_leaves_nothing(new_vm: Callable[..., VM], temporary_directory: Path) -> None:
    await warm_up(new_vm)
    before = now()

    async def boot_and_fail() -> None:
        async with new_vm("RE") as vm:
            await vm.boot()
            assert now() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await boot_and_fail()
    assert now() == before


@pytest.mark.parametrize("what", ["pause", "write", "shutdown", "exit"])
async def test_cancelling_what_is_awaited_after_the_boot_leaves_nothing(
    new_vm: Callable[..., VM], temporary_directory: Path, what: str
) -> None:
    await warm_up(new_vm)
    before = now()
    async with new_vm("RH" if what == "write" else "RE") as vm:
        await vm.boot()
        calls = {
            "pause": vm.pause,
            "write": lambda: vm.console.write(bytes(1 << 20)),
            "shutdown": vm.shutdown,
            "exit": vm.events.exit.wait,
        }
        for delay_s in (0, 0.001, 0.01):
            with anyio.move_on_after(delay_s):
                await calls[what]()
            if vm.state == "paused":
                await vm.resume()
    assert now() == before
