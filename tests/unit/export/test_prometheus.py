"""VmCollector and RecordCollector: metrics in a registry of the caller's."""

from __future__ import annotations

import sys

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from asyncvmm import VM
from asyncvmm.errors import ConfigError, HostError
from asyncvmm.events.types import AccelProbe, GuestBootTime, LogLost, PhaseEnded, VmState
from asyncvmm.export.exposition import exposition
from asyncvmm.export.prometheus import BUCKETS_S, COUNTERS, HISTOGRAMS, RecordCollector, VmCollector
from asyncvmm.export.records import NotARecord
from tests.support.openmetrics import families_of


def booted(vm: VM, accel: str, boot_ns: int) -> None:
    """What a boot says, as far as metrics care."""
    for event in (
        VmState(0, "starting", "new"),
        AccelProbe(1, accel),
        PhaseEnded(boot_ns, "boot", 0, boot_ns, "total"),
        VmState(boot_ns, "ready", "booting"),
    ):
        vm.events.publish(event)


def test_many_vms_are_counted_in_one_registry() -> None:
    registry = CollectorRegistry()
    collector = VmCollector(registry)
    for accel, boot_ns in (("kvm", 7_000_000), ("kvm", 80_000_000), ("qemu", 2_500_000_000)):
        vm = VM()
        collector.watch(vm)
        booted(vm, accel, boot_ns)
    of_kvm = {"accel": "kvm", "name": "boot", "operation": "boot"}
    assert registry.get_sample_value("asyncvmm_boots_total", {"accel": "kvm", "outcome": "ready"}) == 2
    assert registry.get_sample_value("asyncvmm_boots_total", {"accel": "qemu", "outcome": "ready"}) == 1
    assert registry.get_sample_value("asyncvmm_phase_duration_seconds_sum", of_kvm) == pytest.approx(0.087)
    assert registry.get_sample_value("asyncvmm_phase_duration_seconds_bucket", {**of_kvm, "le": "0.01"}) == 1
    assert registry.get_sample_value("asyncvmm_phase_duration_seconds_bucket", {**of_kvm, "le": "0.1"}) == 2


def test_a_guest_that_says_an_absurd_time_is_still_counted() -> None:
    registry = CollectorRegistry()
    vm = VM()
    VmCollector(registry).watch(vm)
    vm.events.publish(GuestBootTime(1, "init_entry", (1 << 64) - 1))
    booted(vm, "kvm", 7_000_000)
    stage = {"accel": "kvm", "stage": "init_entry"}
    assert registry.get_sample_value("asyncvmm_guest_stage_seconds_count", stage) == 1
    assert registry.get_sample_value("asyncvmm_boots_total", {"accel": "kvm", "outcome": "ready"}) == 1


def test_a_vm_no_longer_watched_is_not_counted() -> None:
    collector, vm = VmCollector(), VM()
    end = collector.watch(vm)
    vm.events.publish(LogLost(1, 3))
    end()
    vm.events.publish(LogLost(2, 5))
    assert collector.registry.get_sample_value("asyncvmm_events_lost_total") == 3
    assert not vm.events.listening


def test_nothing_is_global() -> None:
    VmCollector()
    VmCollector()
    assert not [metric.name for metric in REGISTRY.collect() if metric.name.startswith("asyncvmm")]


def test_two_collectors_in_one_registry_are_refused() -> None:
    registry = CollectorRegistry()
    VmCollector(registry)
    with pytest.raises(ConfigError, match="a registry without asyncvmm's metrics"):
        VmCollector(registry)


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(HostError, match=r"asyncvmm\[metrics\]"):
        VmCollector()


def test_the_text_is_open_metrics_with_every_metric_named() -> None:
    collector, vm = VmCollector(), VM()
    collector.watch(vm)
    booted(vm, "kvm", 7_000_000)
    families = families_of(exposition(collector.registry, "-").decode())
    assert set(families) == {f"asyncvmm_{name}" for name in (*COUNTERS, *HISTOGRAMS)}
    assert all(family.documentation.endswith(".") for family in families.values())
    bounds = [
        sample.labels["le"] for sample in families["asyncvmm_phase_duration_seconds"].samples if "le" in sample.labels
    ]
    assert [float(bound) for bound in bounds] == [*BUCKETS_S, float("inf")]


def test_names_that_a_file_made_up_cannot_break_the_text() -> None:
    collector = RecordCollector()
    for name in ('"} 1\nevil 2', "é", "\x00", "a" * 500, "ok"):
        collector.add({"v": 1, "t_ns": 0, "vm": name, "event": "phase", "name": name, "duration_ns": 1})
    text = exposition(collector.registry, "-").decode()
    families = families_of(text)
    names = {sample.labels["name"] for sample in families["asyncvmm_phase_duration_seconds"].samples}
    assert names == {"other", "ok"}


def test_a_record_that_is_not_right_is_not_counted_as_one() -> None:
    collector = RecordCollector()
    with pytest.raises(NotARecord):
        collector.add({"v": 1, "t_ns": 0, "vm": "a", "event": "phase"})
    collector.add_unreadable()
    assert (collector.records, collector.unreadable) == (0, 1)
    assert collector.registry.get_sample_value("asyncvmm_lines_unreadable_total") == 1
