"""Metrics and spans of VMs on /dev/kvm, where exits and failures have reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio.to_thread
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from asyncvmm import VM, BootError, VMConfig
from asyncvmm.errors import SnapshotFailed
from asyncvmm.export.exposition import exposition
from asyncvmm.export.otel import trace_boot
from asyncvmm.export.prometheus import VmCollector
from tests.support.echoing import echoed
from tests.support.openmetrics import values_of

pytestmark = pytest.mark.anyio

Make = Callable[[str], VM]


@pytest.fixture
def vm(guest: Callable[[str], Path]) -> Make:
    """A VM whose guest does what ``program`` says."""
    return lambda program: VM(VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=4, accel="kvm"))


async def values(collector: VmCollector) -> dict[tuple[str, ...], float]:
    """Off the loop: on an emulated host the parser takes most of a second."""
    return await anyio.to_thread.run_sync(lambda: values_of(exposition(collector.registry, "-").decode()))


async def test_exits_of_several_vms_add_up_by_reason(vm: Make) -> None:
    collector = VmCollector()
    expected: dict[str, int] = {}
    for program in ("BRE", "RE"):
        async with vm(program) as machine:
            collector.watch(machine)
            await machine.boot()
        assert machine.exits is not None
        for reason, entry in machine.exits.by_reason.items():
            expected[reason] = expected.get(reason, 0) + entry.count
    found = await values(collector)
    assert {key[1]: value for key, value in found.items() if key[0] == "asyncvmm_exits_total"} == expected
    assert found["asyncvmm_boots_total", "kvm", "ready"] == 2
    assert found["asyncvmm_phase_duration_seconds_count", "kvm", "vcpu_create", "boot"] == 2
    assert "other" not in {word for key in found for word in key}


async def test_a_boot_that_fails_is_counted_by_its_reason_and_its_exits_once(vm: Make) -> None:
    collector, exporter = VmCollector(), InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    machine = vm("BT")
    collector.watch(machine)
    trace_boot(machine, provider)
    with pytest.raises(BootError) as raised:
        await machine.boot()
    found = await values(collector)
    assert found["asyncvmm_boot_failures_total", "kvm", "BootError", raised.value.reason] == 1
    assert raised.value.exits is not None
    told = sum(value for key, value in found.items() if key[0] == "asyncvmm_exits_total")
    assert told == raised.value.exits.total
    root = exporter.get_finished_spans()[-1]
    assert (root.name, root.status.is_ok) == ("asyncvmm.total", False)
    assert dict(root.events[-1].attributes or {})["asyncvmm.reason"] == raised.value.reason


async def test_snapshots_and_the_vms_made_of_them_are_counted_with_their_machine(vm: Make, tmp_path: Path) -> None:
    collector = VmCollector()

    def watch(machine: VM, *_: int) -> None:
        collector.watch(machine)

    async with vm("RE") as original:
        watch(original)
        await original.boot()
        async with await original.snapshot(out=tmp_path / "s") as snapshot:
            with pytest.raises(SnapshotFailed):
                await original.snapshot(out=tmp_path / "s")
            async with await VM.restore(snapshot, prepare=watch) as restored:
                assert await echoed(restored, b"x") == b"x"
            async with snapshot.clones(2, prepare=watch) as clones:
                for clone in clones:
                    assert await echoed(clone, b"x") == b"x"
    found = await values(collector)
    assert found["asyncvmm_snapshots_total", "kvm", "saved", "now"] == 1
    assert found["asyncvmm_snapshots_total", "kvm", "failed", "none"] == 1
    assert found["asyncvmm_snapshot_failures_total", "kvm", "SnapshotFailed"] == 1
    assert found["asyncvmm_snapshot_pause_seconds_count", "kvm", "full"] == 1
    assert found["asyncvmm_snapshot_pause_seconds_sum", "kvm", "full"] > 0
    assert found["asyncvmm_snapshot_save_seconds_sum", "kvm", "full"] > 0
    assert found["asyncvmm_snapshot_bytes_total", "kvm", "full"] > 0
    assert found["asyncvmm_restores_total", "kvm", "restored"] == 3
    assert found["asyncvmm_clones_total", "kvm", "restored"] == 2
    assert found["asyncvmm_boots_total", "kvm", "ready"] == 1
    for stage in ("mapped", "first_exit", "first_guest_event"):
        assert found["asyncvmm_restore_stage_seconds_count", "kvm", stage] == 3
    assert found["asyncvmm_phase_duration_seconds_count", "kvm", "total", "restore"] == 3
    assert found["asyncvmm_phase_duration_seconds_count", "kvm", "total", "boot"] == 1
    assert not {"other", "unknown"} & {word for key in found for word in key}
