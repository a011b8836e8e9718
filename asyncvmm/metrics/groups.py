"""Every group of metrics by its name in a ``metrics`` line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncvmm.metrics.counters import MetricGroup
from asyncvmm.metrics.machine import (
    I8042Metrics,
    LatenciesMetrics,
    SignalMetrics,
    UartMetrics,
    VcpuMetrics,
    VmmMetrics,
)
from asyncvmm.metrics.virtio import (
    BalloonMetrics,
    BlockMetrics,
    ConsoleMetrics,
    EntropyMetrics,
    NetMetrics,
    VsockMetrics,
)

__all__ = [
    "GROUPS",
    "BalloonMetrics",
    "BlockMetrics",
    "ConsoleMetrics",
    "EntropyMetrics",
    "I8042Metrics",
    "LatenciesMetrics",
    "NetMetrics",
    "SignalMetrics",
    "UartMetrics",
    "VcpuMetrics",
    "VmmMetrics",
    "VsockMetrics",
]

GROUPS: Final[Mapping[str, type[MetricGroup]]] = {
    "balloon": BalloonMetrics,
    "block": BlockMetrics,
    "console": ConsoleMetrics,
    "entropy": EntropyMetrics,
    "i8042": I8042Metrics,
    "latencies_us": LatenciesMetrics,
    "net": NetMetrics,
    "signals": SignalMetrics,
    "uart": UartMetrics,
    "vcpu": VcpuMetrics,
    "vmm": VmmMetrics,
    "vsock": VsockMetrics,
}
"""The class of each group."""
