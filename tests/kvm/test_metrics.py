"""Metrics of a guest that runs: what it did, count by count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

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
