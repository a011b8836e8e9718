"""Counting exits on the vCPU threads, each thread into counters of its own; the sum is taken when somebody asks.

No lock: one writer per counter, and a reader may see a count that is one exit ahead of its nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from asyncvmm.effects import ExitCount, ExitStatistics
from asyncvmm.machine.kvm.fastpath.binding import Fastpath

MOST_ADDRESSES = 256
"""Distinct addresses counted one by one for each vCPU; a guest that touches more has the rest under ``out other``,
``mmio-read other`` and so on."""

OTHER = "other"

_UNMEASURED = 1 << 63


class Counter:
    """How often, how long in all, at most, and at least (ns); the least is beyond all measure while there is none."""

    __slots__ = ("count", "max_ns", "min_ns", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0
        self.min_ns = _UNMEASURED

    def add(self, took_ns: int) -> None:
        """Count one that took ``took_ns``."""
        self.count += 1
        self.total_ns += took_ns
        if took_ns > self.max_ns:
            self.max_ns = took_ns
        if took_ns < self.min_ns:
            self.min_ns = took_ns

    def merge(self, other: Counter) -> None:
        """Add another's count and times."""
        self.count += other.count
        self.total_ns += other.total_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.min_ns = min(self.min_ns, other.min_ns)

    def record(self) -> ExitCount:
        """As a record."""
        return ExitCount(self.count, self.total_ns, self.max_ns, 0 if self.min_ns == _UNMEASURED else self.min_ns)


class PortCounter(Counter):
    """One direction of one byte-wide I/O port: the device's bound method, its lock, and the counter. The hot path."""

    __slots__ = ("access", "lock", "offset")

    def __init__(self, access: Callable[..., Any], offset: int, lock: AbstractContextManager[object]) -> None:
        super().__init__()
        self.access = access
        self.offset = offset
        self.lock = lock


class VcpuCounters:
    """The counters of one vCPU thread."""

    def __init__(self) -> None:
        self.ports: dict[int, PortCounter] = {}
        """Resolved byte-wide ports, by the word that ``exits.io_key`` gives."""
        self.by_address: dict[str, Counter] = {}
        self.by_reason: dict[str, Counter] = {}
        self.last = ""

    def add(self, reason: str, label: str | None, took_ns: int) -> None:
        """Count one exit outside the hot path; ``label`` as ExitStatistics.by_address names it."""
        self.by_reason.setdefault(reason, Counter()).add(took_ns)
        if label is not None:
            known = label in self.by_address or len(self.by_address) < MOST_ADDRESSES
            key = label if known else f"{label.partition(' ')[0]} {OTHER}"
            self.by_address.setdefault(key, Counter()).add(took_ns)

    def total(self) -> int:
        """Exits so far."""
        hot = sum(port.count for port in list(self.ports.values()))
        return hot + sum(counter.count for counter in list(self.by_reason.values()))

    def at_ports(self, first: int, size: int) -> int:
        """Of them, byte-wide accesses of the ports from ``first`` on."""
        hot = sum(counter.count for key, counter in list(self.ports.items()) if first <= key >> 16 < first + size)
        labels = [port_label(is_out, port) for port in range(first, first + size) for is_out in (False, True)]
        return hot + sum(self.by_address[label].count for label in labels if label in self.by_address)

    def named_ports(self) -> Iterator[tuple[str, Counter]]:
        """The hot path's counters with their labels."""
        for key, counter in list(self.ports.items()):
            yield port_label(bool(key & 1), key >> 16), counter


def port_label(is_out: bool, port: int) -> str:
    """``out 0x3f8`` or ``in 0x3f8``."""
    return f"{'out' if is_out else 'in'} {port:#x}"


def collect(vcpus: Iterable[VcpuCounters], unmapped: int) -> ExitStatistics:
    """The sum over all vCPUs, as a record."""
    reasons: dict[str, Counter] = {}
    addresses: dict[str, Counter] = {}
    for vcpu in vcpus:
        for label, counter in vcpu.named_ports():
            _merge(addresses, label, counter)
            _merge(reasons, "IO", counter)
        for label, counter in list(vcpu.by_address.items()):
            _merge(addresses, label, counter)
        for reason, counter in list(vcpu.by_reason.items()):
            _merge(reasons, reason, counter)
    return ExitStatistics(by_reason=_records(reasons), by_address=_records(addresses), unmapped=unmapped)


def _merge(into: dict[str, Counter], key: str, counter: Counter) -> None:
    into.setdefault(key, Counter()).merge(counter)


def _records(counters: dict[str, Counter]) -> dict[str, ExitCount]:
    return {key: counter.record() for key, counter in counters.items()}


def posted_counters(fastpath: Fastpath, tsc_khz: int) -> VcpuCounters:
    """What the native run loop answered, its cycles of the time-stamp counter turned into nanoseconds."""
    counters = VcpuCounters()
    for port in fastpath.data.port:
        if port.count:
            counter = Counter()
            counter.count = port.count
            counter.total_ns, counter.max_ns = (
                cycles * 1_000_000 // tsc_khz for cycles in (port.cycles, port.max_cycles)
            )
            counter.min_ns = counter.total_ns // counter.count  # the least is not measured there: at most the mean
            counters.by_address[port_label(bool(port.key & 1), port.key >> 16)] = counter
            counters.by_reason.setdefault("IO", Counter()).merge(counter)
    return counters
