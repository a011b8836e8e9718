"""The distribution's own kernel on the KVM machine: devices and CPUs found by ACPI, a workload run, power off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from asyncvmm import VM, VMConfig

if TYPE_CHECKING:
    from tests.lab.conftest import Live, Story

WORKLOAD = ("sh", "-c", "echo cpus=$(grep -c ^processor /proc/cpuinfo); cat /proc/interrupts; exit 5")
TICKS = ("sh", "-c", "while sleep 0.05; do echo tick; done")
MOST_EXITS_TO_READY = 3000
PATIENCE_S = 150


@pytest.fixture(scope="module", params=[1, 2], ids=["1 vCPU", "2 vCPUs"])
def vcpus(request: pytest.FixtureRequest) -> int:
    """How many vCPUs the guest gets."""
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def story(live: Live, vcpus: int) -> Story:
    """One life of a guest, looked at by several tests."""
    return live(VMConfig(vcpus=vcpus, accel="kvm", workload=WORKLOAD))


def test_the_stock_kernel_boots_on_kvm(story: Story) -> None:
    assert story.accel == "kvm"


def test_the_stages_of_the_boot_come_in_order(story: Story) -> None:
    times = list(story.profile.to_dict().values())
    assert len(times) == 6
    assert times == sorted(times)
    assert times[0] > 0


def test_booting_takes_few_exits_to_userspace(story: Story) -> None:
    counts = sorted(((entry.count, name) for name, entry in story.exits.by_address.items()), reverse=True)
    assert story.exits.total <= MOST_EXITS_TO_READY, counts


def test_the_guest_sees_its_vcpus(story: Story, vcpus: int) -> None:
    assert f"cpus={vcpus}\n" in story.console


def test_every_vcpu_takes_timer_interrupts(story: Story, vcpus: int) -> None:
    counts = interrupts(story, "LOC:")[:vcpus]
    assert len(counts) == vcpus
    assert all(int(count) > 0 for count in counts)


def test_the_console_is_driven_by_its_interrupt(story: Story, vcpus: int) -> None:
    line = next(line for line in story.console.splitlines() if line.endswith("ttyS0"))
    assert sum(map(int, line.split()[1 : 1 + vcpus])) > 0


def test_the_workloads_exit_code_arrives(story: Story) -> None:
    assert story.code == 5


def test_the_guest_powers_off_by_acpi(story: Story) -> None:
    assert story.end == "shutdown"


@pytest.mark.anyio
async def test_a_paused_guest_takes_no_exits_and_runs_on_when_resumed() -> None:
    with anyio.fail_after(PATIENCE_S):
        async with VM(VMConfig(vcpus=2, accel="kvm", workload=TICKS)) as vm:
            console = vm.console.subscribe()
            await vm.boot()
            await vm.events.pre_exec
            await vm.pause()
            assert vm.exits is not None
            before = vm.exits.total
            console.take()
            await anyio.sleep(0.5)
            assert vm.exits.total == before
            await vm.resume()
            assert await anext(console)


def interrupts(story: Story, label: str) -> list[str]:
    """The words behind a label of /proc/interrupts."""
    return next(line.split()[1:] for line in story.console.splitlines() if line.split()[:1] == [label])
