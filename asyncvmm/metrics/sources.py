"""Groups that are counted elsewhere: their totals out of what the serial ports, the keyboard controller and the vCPUs
count anyway. Each function is what a source of VmMetrics calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from asyncvmm.effects import ExitCount, ExitStatistics

if TYPE_CHECKING:
    from asyncvmm.devices.i8042 import I8042
    from asyncvmm.devices.serial import Serial
    from asyncvmm.metrics.counters import LatencyAggregate
    from asyncvmm.metrics.machine import I8042Metrics, UartMetrics, VcpuMetrics

_ACCESSES: Final = ("IO", "MMIO")


def sum_uart(group: UartMetrics, ports: Iterable[Serial]) -> None:
    """The sum over the serial ports. Bytes that a run loop still keeps aside are not in it: collect them first."""
    devices = tuple(ports)
    group.error_count = sum(device.error_count for device in devices)
    group.flush_count = sum(device.flush_count for device in devices)
    group.missed_read_count = sum(device.missed_read_count for device in devices)
    group.missed_write_count = sum(device.missed_write_count for device in devices)
    group.read_count = sum(device.read_count for device in devices)
    group.write_count = sum(device.write_count for device in devices)


def copy_i8042(group: I8042Metrics, controller: I8042) -> None:
    """The controller's counts."""
    group.missed_read_count = controller.missed_read_count
    group.missed_write_count = controller.missed_write_count
    group.read_count = controller.read_count
    group.reset_count = controller.reset_count
    group.write_count = controller.write_count


def sum_vcpus(group: VcpuMetrics, exits: ExitStatistics | None) -> None:
    """Exits by what they were for, all vCPUs together; None, where the machine cannot tell, changes nothing."""
    if exits is None:
        return
    kinds = _by_kind(exits)
    group.exit_io_in = _set(group.exit_io_in_agg, kinds.get("in"))
    group.exit_io_out = _set(group.exit_io_out_agg, kinds.get("out"))
    group.exit_mmio_read = _set(group.exit_mmio_read_agg, kinds.get("mmio-read"))
    group.exit_mmio_write = _set(group.exit_mmio_write_agg, kinds.get("mmio-write"))
    group.failures = sum(entry.count for reason, entry in exits.by_reason.items() if reason not in _ACCESSES)


def _by_kind(exits: ExitStatistics) -> dict[str, ExitCount]:
    """The sum over all addresses of ``in``, ``out``, ``mmio-read`` and ``mmio-write``: the labels' first word."""
    kinds: dict[str, ExitCount] = {}
    for label, entry in exits.by_address.items():
        kind = label.partition(" ")[0]
        old = kinds.get(kind, ExitCount(0, 0, 0))
        kinds[kind] = ExitCount(
            old.count + entry.count,
            old.total_ns + entry.total_ns,
            max(old.max_ns, entry.max_ns),
            min(filter(None, (old.min_ns, entry.min_ns)), default=0),
        )
    return kinds


def _set(aggregate: LatencyAggregate, entry: ExitCount | None) -> int:
    """Bring the aggregate to the entry's times; returns its count."""
    if entry is None:
        return 0
    aggregate.sum_us, aggregate.max_us = entry.total_ns // 1000, entry.max_ns // 1000
    aggregate.min_us = entry.min_ns // 1000
    return entry.count
