"""QemuCounts: a VM's metrics out of what one QEMU can tell.

Serial and console ports are counted at their sockets: what was sent into one counts as read by the guest. Disks are
QEMU's to count (query-blockstats: BlockDeviceStats in qapi/block-core.json of QEMU 7.2). A flush of metrics cannot
wait for an answer, so QEMU is asked again and again, and a last time before it is killed; what a guest does to its
disks just before it ends QEMU itself, nobody is told. QEMU adds up times, but has no shortest and longest; network
card and entropy device it does not count.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.devices import node_name
from asyncvmm.machine.waiting import wait_out
from asyncvmm.metrics.counters import LatencyAggregate
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.metrics.vm_metrics import VmMetrics

POLL_S: Final = 1.0
"""Seconds from one question about the disks to the next."""

LAST_ANSWER_S: Final = 0.25
"""Longest wait for the last answer: a QEMU that hangs must be stopped soon as well."""

Ask = Callable[[str, Callable[[Any], None]], None]
"""QmpControl.ask."""

_QUERY: Final = "query-blockstats"
_KINDS: Final = ("rd", "wr", "flush", "unmap")
_COUNTED: Final[Mapping[str, tuple[str, ...]]] = {
    "read_bytes": ("rd_bytes",),
    "write_bytes": ("wr_bytes",),
    "read_count": ("rd_operations",),
    "write_count": ("wr_operations",),
    "flush_count": ("flush_operations",),
    "execute_fails": tuple(f"failed_{kind}_operations" for kind in _KINDS),
    "invalid_reqs_count": tuple(f"invalid_{kind}_operations" for kind in _KINDS),
}
_TIMED: Final[Mapping[str, str]] = {"read_agg": "rd_total_time_ns", "write_agg": "wr_total_time_ns"}


class QemuCounts:
    """Counts for one QEMU, from its start on, in ``metrics``; on the loop."""

    def __init__(self, metrics: VmMetrics, plan: BootPlan) -> None:
        self._metrics = metrics
        self._disks = {
            node_name(index): DiskCounts(metrics.block(drive.config.id or node_name(index)))
            for index, drive in enumerate(plan.resources.drives)
        }
        self._ask: Ask | None = None
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None
        self._last: asyncio.Future[None] | None = None

    def watch_ports(self, serial: Iterable[Channel], console: Iterable[Channel]) -> None:
        """Count what goes through the serial ports' sockets, and through those of the virtio console's."""
        serial, console = tuple(serial), tuple(console)

        def sum_serial() -> None:
            group = self._metrics.uart
            group.write_count, group.read_count = _received(serial), _sent(serial)

        def sum_console() -> None:
            group = self._metrics.console
            group.tx_bytes_count, group.rx_bytes_count = _received(console), _sent(console)

        self._metrics.count_by("uart", sum_serial)
        self._metrics.count_by("console", sum_console)

    def watch_disks(self, ask: Ask) -> None:
        """Ask for the disks' counts every POLL_S until ``close``; QEMU takes commands by now. Nothing without disks."""
        if self._disks:
            self._ask = ask
            self._wait()

    def refresh(self) -> None:
        """Ask now, unless an answer is still to come."""
        if self._ask is not None and not self._asked:
            self._asked = True
            self._ask(_QUERY, self._answered)

    async def finish(self) -> None:
        """Ask a last time; returns with the answer, or without. A cancellation is heard afterwards."""
        if self._ask is None or self._last is not None:
            return
        loop = asyncio.get_running_loop()
        last = self._last = loop.create_future()
        patience = loop.call_later(LAST_ANSWER_S, self._settle)
        self._ask(_QUERY, self._answered_last)
        try:
            await wait_out(last)
        finally:
            patience.cancel()

    def close(self) -> None:
        """QEMU is gone. May be called again."""
        self._ask = None
        self._settle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(POLL_S, self._poll)

    def _poll(self) -> None:
        self._wait()
        self.refresh()

    def _answered(self, answer: Any) -> None:
        self._asked = False
        for name, stats in stats_by_node(answer).items():
            if name in self._disks:
                self._disks[name].take(stats)

    def _answered_last(self, answer: Any) -> None:
        self._answered(answer)
        self._settle()

    def _settle(self) -> None:
        if self._last is not None and not self._last.done():
            self._last.set_result(None)


class DiskCounts:
    """Adds to ``group`` what one QEMU's counts of one disk grew by: a second attempt to boot has a QEMU of its own."""

    def __init__(self, group: BlockMetrics) -> None:
        self._group = group
        self._taken: dict[str, int] = {}

    def take(self, stats: Mapping[str, Any]) -> None:
        """``stats``: a BlockDeviceStats."""
        for name, total in totals(stats).items():
            growth = total - self._taken.get(name, 0)
            if growth > 0:
                self._taken[name] = total
                self._add(name, growth)

    def _add(self, name: str, growth: int) -> None:
        value = getattr(self._group, name)
        if isinstance(value, LatencyAggregate):
            value.sum_us += growth
        else:
            setattr(self._group, name, value + growth)


def stats_by_node(answer: object) -> dict[str, Mapping[str, Any]]:
    """Each BlockDeviceStats of an answer to query-blockstats by the name of its node; of what is none, nothing."""
    entries = [entry for entry in answer if isinstance(entry, dict)] if isinstance(answer, list) else []
    return {str(entry.get("node-name")): entry["stats"] for entry in entries if isinstance(entry.get("stats"), dict)}


def totals(stats: Mapping[str, Any]) -> dict[str, int]:
    """A BlockDeviceStats under the names of BlockMetrics; times in microseconds."""
    counted = {ours: sum(_number(stats, name) for name in theirs) for ours, theirs in _COUNTED.items()}
    return counted | {ours: _number(stats, theirs) // 1000 for ours, theirs in _TIMED.items()}


def _number(stats: Mapping[str, Any], name: str) -> int:
    value = stats.get(name, 0)
    return value if isinstance(value, int) else 0


def _received(channels: tuple[Channel, ...]) -> int:
    return sum(channel.received for channel in channels)


def _sent(channels: tuple[Channel, ...]) -> int:
    return sum(channel.sent for channel in channels)
