"""Prometheus: metrics of VMs by the library prometheus-client (extra ``metrics``), of VMs at hand or of their files.

    registry = CollectorRegistry()
    collector = VmCollector(registry)
    vm = VM(config)
    collector.watch(vm)

Nothing is global: every metric is in the registry it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from asyncvmm.errors import ConfigError
from asyncvmm.events.types import Event
from asyncvmm.export.extras import need
from asyncvmm.export.facts import EVENTS_READ, Count, Duration, Fact, Fold, VmFacts, Vocabulary
from asyncvmm.export.records import Record, record_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Histogram

    from asyncvmm.vm import VM

BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
"""Upper bounds of the histograms, in seconds: from 100 us to 5 min."""

COUNTERS = {
    "boots": ("Boots that ended: ready, failed or cancelled.", ("accel", "outcome")),
    "boot_failures": ("Boots that failed, by the error's class and its reason.", ("accel", "kind", "reason")),
    "vm_failures": ("VMs that failed after they had been ready.", ("accel", "kind", "reason")),
    "boot_retries": ("Boot attempts that were made again for want of the host's resources.", ("accel",)),
    "restores": ("VMs made of a snapshot: restored, failed or cancelled.", ("accel", "outcome")),
    "clones": ("Clones of a snapshot, which are in restores as well.", ("accel", "outcome")),
    "restore_failures": ("Restores that failed, by the error's class and its reason.", ("accel", "kind", "reason")),
    "snapshots": ("Snapshots that were asked for: saved, failed or cancelled.", ("accel", "outcome", "trigger")),
    "snapshot_failures": ("Snapshots that failed, by the error's class.", ("accel", "kind")),
    "snapshot_bytes": ("Bytes on disk that saved snapshots took.", ("accel", "type")),
    "phase_failures": ("Phases of host work that failed; they are in no histogram.", ("name", "accel", "operation")),
    "exits": ("Exits of VMs that have ended from guest to userspace, by KVM's reason.", ("reason",)),
    "events_lost": ("Events dropped because their reader did not keep up.", ()),
    "lines_unreadable": ("Lines that are not events as asyncvmm writes them.", ()),
}
"""Counters by name, without the ``asyncvmm_`` before and the ``_total`` after it: what they count, their labels."""

HISTOGRAMS = {
    "phase_duration_seconds": ("How long phases of host work took.", ("name", "accel", "operation")),
    "guest_stage_seconds": ("The guest's monotonic clock when PID 1 reached a stage, once a VM.", ("stage", "accel")),
    "restore_stage_seconds": ("From a restore's call until it came to a stage.", ("stage", "accel")),
    "snapshot_pause_seconds": ("How long guests stood still for a snapshot.", ("accel", "type")),
    "snapshot_save_seconds": ("From a snapshot's trigger until it was on disk.", ("accel", "type")),
}
"""Histograms by name, without the ``asyncvmm_`` before it."""


class Metrics:
    """The metrics in a registry, told facts. May be told from one thread and scraped from others.

    Raises HostError without prometheus-client, ConfigError for a registry that has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        need("metrics", "prometheus_client", "metrics")
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = registry if registry is not None else CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._counter_at: dict[tuple[str, tuple[str, ...]], Counter] = {}
        self._histogram_at: dict[tuple[str, tuple[str, ...]], Histogram] = {}
        try:
            for name, (says, labels) in COUNTERS.items():
                self._counters[name] = Counter(f"asyncvmm_{name}", says, labels, registry=self.registry)
            for name, (says, labels) in HISTOGRAMS.items():
                self._histograms[name] = Histogram(
                    f"asyncvmm_{name}", says, labels, registry=self.registry, buckets=BUCKETS_S
                )
        except ValueError as error:
            raise ConfigError("metrics", expected="a registry without asyncvmm's metrics", found=str(error)) from None

    def add(self, facts: Iterable[Fact]) -> None:
        """Count them."""
        for fact in facts:
            place = (fact.metric, fact.labels)
            if isinstance(fact, Count):
                (self._counter_at.get(place) or self._new_counter(fact)).inc(fact.amount)
            else:
                (self._histogram_at.get(place) or self._new_histogram(fact)).observe(fact.seconds)

    # Looking a series up in the library costs more than counting. There are few: the values of labels are bounded.

    def _new_counter(self, fact: Count) -> Counter:
        counter = self._counters[fact.metric]
        series = counter.labels(*fact.labels) if fact.labels else counter
        self._counter_at[fact.metric, fact.labels] = series
        return series

    def _new_histogram(self, fact: Duration) -> Histogram:
        series = self._histograms[fact.metric].labels(*fact.labels)
        self._histogram_at[fact.metric, fact.labels] = series
        return series


class VmCollector:
    """Metrics of the VMs it watches, any number of them, in ``registry`` (a new one of its own if None).

    Raises HostError without prometheus-client, ConfigError for a registry that has these metrics already.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics = Metrics(registry)
        self._vocabulary = Vocabulary()

    @property
    def registry(self) -> CollectorRegistry:
        """Where the metrics are."""
        return self._metrics.registry

    def watch(self, vm: VM) -> Callable[[], None]:
        """Count the VM's events from now on: call it before ``boot()``, or have ``prepare`` of a restore do so.

        Returns a function that ends it.
        """
        facts = VmFacts(self._vocabulary, vm.accel or "unknown", "boot" if vm._restoring is None else "restore")

        def take(event: Event) -> None:
            if event.event in EVENTS_READ:
                self._metrics.add(facts.of(record_of(event)))

        return vm.events.attach(take)


class RecordCollector:
    """Metrics of records read from files. ``records`` counts those that were events, ``unreadable`` what was not."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._metrics = Metrics(registry)
        self._fold = Fold()
        self.records = 0
        self.unreadable = 0

    @property
    def registry(self) -> CollectorRegistry:
        """Where the metrics are."""
        return self._metrics.registry

    def add(self, record: Record) -> None:
        """Count a record. Raises NotARecord, and counts nothing of it, if its fields are not right."""
        self._metrics.add(self._fold.of(record))
        self.records += 1

    def add_unreadable(self) -> None:
        """Count a line that is no record."""
        self._metrics.add([Count("lines_unreadable", ())])
        self.unreadable += 1
