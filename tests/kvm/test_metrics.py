"""Metrics of a guest that runs: what it did, count by count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from asyncvmm import VM, BootError, VMConfig
from asyncvmm.events.types import Event, Metrics
from asyncvmm.metrics.vm_metrics import VmMetrics

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.anyio


async def ended(boot: Boot, name: str) -> VmMetrics:
    """The metrics of a guest that ran to its end: after that of its threads, so that the last exit is counted, too."""
    metrics = VmMetrics()
    async with boot(name) as run:
        run.machine.meter(metrics)
        await run.end()
    return metrics


async def test_polled_output_is_counted_whoever_answered_it(boot: Boot) -> None:
    metrics = await ended(boot, "output")
    groups = metrics.flush(0, 0).groups
    assert groups["uart"]["write_count"] == 20_000
    assert groups["uart"]["missed_write_count"] == 0
    assert groups["vcpu"]["exit_io_in"] == 20_000
    assert groups["vcpu"]["exit_io_out"] == 20_000 + 1  # and the debug exit
    assert groups["vcpu"]["failures"] == 0
    later = metrics.flush(0, 0).groups
    assert (later["uart"]["write_count"], later["vcpu"]["exit_io_out"]) == (0, 0)


async def test_memory_accesses_and_their_times_are_told(boot: Boot) -> None:
    vcpu = (await ended(boot, "mmio")).flush(0, 0).groups["vcpu"]
    assert (vcpu["exit_mmio_read"], vcpu["exit_mmio_write"]) == (4, 4)
    times = vcpu["exit_mmio_read_agg"]
    assert isinstance(times, dict)
    assert times["min_us"] <= times["sum_us"] // 4 <= times["max_us"] <= times["sum_us"]


async def test_a_reset_by_the_keyboard_controller_is_one_write_to_it(boot: Boot) -> None:
    i8042 = (await ended(boot, "reset-i8042")).flush(0, 0).groups["i8042"]
    assert (i8042["write_count"], i8042["reset_count"], i8042["read_count"]) == (1, 1, 0)


async def test_output_is_told_while_the_guest_runs(boot: Boot) -> None:
    metrics = VmMetrics()
    async with boot("echo-ioapic") as run:
        run.machine.meter(metrics)
        await run.said(b">")
        assert metrics.flush(0, 0).groups["uart"]["write_count"] == 1
        await run.machine.write("console", b"abc")
        await run.said(b">abc")
        uart = metrics.flush(0, 0).groups["uart"]
        assert (uart["read_count"], uart["write_count"]) == (3, 3)


async def test_an_exit_that_no_guest_runs_on_after_is_a_failure(boot: Boot) -> None:
    assert (await ended(boot, "triple")).flush(0, 0).groups["vcpu"]["failures"] == 1


# -- a VM's events -----------------------------------------------------------------------------------------------------


class Told:
    """The metrics events of one VM."""

    def __init__(self, vm: VM) -> None:
        self.events: list[Metrics] = []
        vm.events.attach(self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, Metrics):
            self.events.append(event)

    def all_of(self, group: str, name: str) -> list[Any]:
        """What each of them says of a field."""
        return [event.groups[group][name] for event in self.events]


@pytest.fixture
def new_vm(guest: Callable[[str], Path]) -> Callable[..., VM]:
    """A VM whose guest does what ``program`` says, see foreign.S."""

    def make(program: str, **options: Any) -> VM:
        return VM(VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=4, accel="kvm", **options))

    return make


async def test_metrics_are_told_every_so_often_and_at_the_end(new_vm: Callable[..., VM]) -> None:
    async with new_vm("RE", metrics_interval_s=0.01) as vm:
        told = Told(vm)
        async with vm.events.subscribe(types=[Metrics]) as metrics:
            await vm.boot()
            with anyio.fail_after(20):
                for _ in range(3):
                    await anext(metrics)
        before = len(told.events)
    assert len(told.events) > before
    assert sum(told.all_of("uart", "write_count")) == len("READY\n"), "each says what is new"
    assert told.events[-1].groups["vcpu"].keys() >= {"exit_io_in", "exit_io_out", "failures"}


async def test_metrics_are_told_at_the_end_only_where_that_comes_first(new_vm: Callable[..., VM]) -> None:
    async with new_vm("RE") as vm:
        told = Told(vm)
        await vm.boot()
        assert not told.events
    assert told.all_of("uart", "write_count") == [len("READY\n")]
    await vm.stop()
    assert len(told.events) == 1


async def test_metrics_of_a_boot_that_fails_are_told(new_vm: Callable[..., VM]) -> None:
    vm = new_vm("BT")
    told = Told(vm)
    with pytest.raises(BootError):
        await vm.boot()
    assert told.all_of("vcpu", "failures") == [1]
    assert told.all_of("uart", "write_count") == [len("BOOT_TIME:ready:7\n")]


async def test_pausing_and_resuming_are_timed(new_vm: Callable[..., VM]) -> None:
    async with new_vm("RE") as vm:
        await vm.boot()
        before = vm.metrics.flush().groups["latencies_us"]
        assert (before["pause_vm"], before["resume_vm"]) == (0, 0)
        await vm.pause()
        await vm.resume()
        for _ in range(2):  # what is, not what is new
            after = vm.metrics.flush().groups["latencies_us"]
            machine, whole = after["vmm_pause_vm"], after["pause_vm"]
            assert isinstance(machine, int)
            assert isinstance(whole, int)
            assert 0 < machine <= whole
