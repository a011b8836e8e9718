"""All metrics of one VM: the groups by name, and the flush that makes one ``metrics`` event of them.

Every group of ``GROUPS`` is always there, as in Firecracker's lines: one without a device behind it says 0. Of disks
and network cards each device has a group of its own, ``block_<id>`` and ``net_<id>``, and ``block`` and ``net`` are
their sums. Nothing here is global.

Some groups are counted elsewhere (registers, exits): a source, called before each flush, sets their totals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Final

from asyncvmm.errors import ConfigError
from asyncvmm.events.types import Metrics
from asyncvmm.metrics.counters import Flushed, MetricGroup, added_up
from asyncvmm.metrics.groups import (
    GROUPS,
    BalloonMetrics,
    BlockMetrics,
    ConsoleMetrics,
    EntropyMetrics,
    I8042Metrics,
    LatenciesMetrics,
    NetMetrics,
    SignalMetrics,
    UartMetrics,
    VcpuMetrics,
    VmmMetrics,
    VsockMetrics,
)

Source = Callable[[], None]
"""Sets the totals of a group that is counted elsewhere. Must be quick: it is called on the loop."""

_SINGLE: Final = tuple(name for name in GROUPS if name not in ("block", "net"))

_log = logging.getLogger("asyncvmm.metrics")


class VmMetrics:
    """The groups of one VM: one of a kind by attribute, disks and network cards by ``block`` and ``net``."""

    def __init__(self) -> None:
        self.balloon = BalloonMetrics()
        self.console = ConsoleMetrics()
        self.entropy = EntropyMetrics()
        self.i8042 = I8042Metrics()
        self.latencies_us = LatenciesMetrics()
        self.signals = SignalMetrics()
        self.uart = UartMetrics()
        self.vcpu = VcpuMetrics()
        self.vmm = VmmMetrics()
        self.vsock = VsockMetrics()
        self._blocks: dict[str, BlockMetrics] = {}
        self._nets: dict[str, NetMetrics] = {}
        self._sources: dict[str, Source] = {}

    def block(self, drive_id: str) -> BlockMetrics:
        """The group of one disk, ``block_<drive_id>``; made when it is first asked for."""
        return self._blocks.setdefault(drive_id, BlockMetrics())

    def net(self, card_id: str) -> NetMetrics:
        """The group of one network card, ``net_<card_id>``; made when it is first asked for."""
        return self._nets.setdefault(card_id, NetMetrics())

    def count_by(self, name: str, source: Source) -> None:
        """Have ``source`` called before each flush, to set the totals of group ``name``.

        A former one is forgotten, and the totals count from 0 again: a second attempt to boot has a machine of its
        own. Raises ConfigError for a name that is none of a group there is one of.
        """
        if name not in _SINGLE:
            raise ConfigError("group of metrics", expected=f"one of {', '.join(_SINGLE)}", found=name)
        if name in self._sources:
            group: MetricGroup = getattr(self, name)
            group.begin_anew()
        self._sources[name] = source

    def flush(self, t_ns: int, utc_timestamp_ms: int) -> Metrics:
        """What came since the last flush, and what is. A source that fails is logged; its group stays as it was."""
        for name, source in self._sources.items():
            try:
                source()
            except Exception:
                _log.exception("the source of metrics of %s failed", name)
        flushed = dict(self._flushed())
        return Metrics(t_ns, utc_timestamp_ms, {name: flushed[name] for name in sorted(flushed)})

    def _flushed(self) -> Iterator[tuple[str, dict[str, Flushed]]]:
        for name in _SINGLE:
            group: MetricGroup = getattr(self, name)
            yield name, group.flush()
        yield from _with_sum("block", self._blocks, BlockMetrics)
        yield from _with_sum("net", self._nets, NetMetrics)


def _with_sum(
    name: str, devices: dict[str, BlockMetrics] | dict[str, NetMetrics], kind: type[MetricGroup]
) -> Iterator[tuple[str, dict[str, Flushed]]]:
    parts = {f"{name}_{device}": group.flush() for device, group in devices.items()}
    yield from parts.items()
    yield name, added_up([kind().flush(), *parts.values()])
