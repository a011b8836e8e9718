"""QEMU's balloon by QMP: a BalloonBackend (asyncvmm/balloon.py).

Facts: qapi/machine.json, docs/virtio-balloon-stats.txt and hw/virtio/virtio-balloon.c of QEMU 7.2. What is not obvious:

- ``balloon`` and ``query-balloon`` speak of the memory that is left, in bytes, and never of none.
- Statistics are QEMU's to ask for, on a timer that fires at once when it is made, and they are dated in whole seconds:
  only those of another second are known to be new.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import anyio

from asyncvmm.devices.virtio.balloon.stats import PAGES_PER_MIB, BalloonStats
from asyncvmm.errors import GuestError, MachineError, StateError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.devices import BALLOON
from asyncvmm.metrics.groups import BalloonMetrics

ANSWER_S = 5.0
"""Longest wait for a guest's statistics."""

STATUS_QUERY = (7, 2)
"""The first release with ``x-query-virtio-status``."""

_PAGE = 4096
_LOOK_S = 0.01
_RARELY_S = 86400
_PATH = f"/machine/peripheral/{BALLOON}"
_UNKNOWN = 2**64 - 1
_STATISTICS = {
    "stat-swap-in": "swap_in",
    "stat-swap-out": "swap_out",
    "stat-major-faults": "major_faults",
    "stat-minor-faults": "minor_faults",
    "stat-free-memory": "free_memory",
    "stat-total-memory": "total_memory",
    "stat-available-memory": "available_memory",
    "stat-disk-caches": "disk_caches",
    "stat-htlb-pgalloc": "hugetlb_allocations",
    "stat-htlb-pgfail": "hugetlb_failures",
}


class Execute(Protocol):
    """QmpControl.execute."""

    def __call__(self, name: str, arguments: Mapping[str, Any] | None = None) -> Awaitable[Any]:
        """Run a command; raises MachineError."""


class QmpBalloon:
    """The balloon of one QEMU.

    ``execute`` runs a QMP command. ``metrics``: where to count the statistics; QEMU does not say how many requests the
    guest made. ``is_pci``: the device is on PCI, not on virtio-mmio. A QEMU of a ``version`` that cannot tell whether
    the guest has a driver is taken to have one.
    """

    def __init__(
        self, execute: Execute, plan: BootPlan, metrics: BalloonMetrics, *, is_pci: bool, version: tuple[int, ...]
    ) -> None:
        self._execute = execute
        self._metrics = metrics
        self._memory = plan.memory_mib << 20
        self._target = 0 if plan.devices.balloon is None else plan.devices.balloon.mib * PAGES_PER_MIB
        self._device = f"{_PATH}/virtio-backend" if is_pci else _PATH
        self._tells_driver = version >= STATUS_QUERY
        self._turn = asyncio.Lock()

    async def set_target_pages(self, pages: int) -> None:
        """Ask the guest for a balloon of that size. Raises StateError without a driver or a running guest."""
        await self._require_driver()
        await self._ask("balloon", size_argument(self._memory, pages))
        self._target = pages

    async def actual_pages(self) -> int:
        """The balloon's size as the guest told it. Raises StateError."""
        left = (await self._ask("query-balloon"))["actual"]
        return max(0, self._memory - int(left)) // _PAGE

    async def stats(self) -> BalloonStats:
        """The guest's statistics, asked for now; twice within a second takes until the next one.

        Raises StateError, or GuestError from a guest that does not answer.
        """
        async with self._turn:
            await self._require_driver()
            stats = await self._fresh_stats()
            return BalloonStats(target_pages=self._target, actual_pages=await self.actual_pages(), **stats)

    async def hint_free_pages(self) -> int:
        """Not on QEMU. Raises StateError."""
        raise StateError("free page hints", expected="a machine that can ask for them", found="QEMU, only to migrate")

    async def _fresh_stats(self) -> dict[str, int]:
        before = (await self._read())["last-update"]
        if before == int(time.time()):
            await anyio.sleep(1.01 - time.time() % 1.0)
        await self._set_interval(0)
        await self._set_interval(_RARELY_S)
        deadline = anyio.current_time() + ANSWER_S
        while (found := await self._read())["last-update"] == before:
            if anyio.current_time() >= deadline:
                waited = f"none for {ANSWER_S:g} s"
                raise GuestError("balloon", reason="timeout", expected="the guest's memory statistics", found=waited)
            await anyio.sleep(_LOOK_S)
        self._metrics.stats_updates_count += 1
        return parse_stats(found["stats"])

    async def _read(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await self._ask("qom-get", {"path": _PATH, "property": "guest-stats"})
        return found

    async def _set_interval(self, seconds: int) -> None:
        await self._ask("qom-set", {"path": _PATH, "property": "guest-stats-polling-interval", "value": seconds})

    async def _require_driver(self) -> None:
        if not self._tells_driver:
            return
        found = await self._ask("x-query-virtio-status", {"path": self._device})
        if not has_driver(found):
            raise StateError("balloon", expected="a guest with a driver for it", found="none yet")

    async def _ask(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        try:
            return await self._execute(name, arguments)
        except MachineError as error:
            raise StateError("balloon", expected="a running guest", found=error) from error


def first_size(plan: BootPlan) -> list[tuple[str, Mapping[str, Any]]]:
    """The QMP command that gives the balloon its first size, which the guest's driver finds when it comes."""
    balloon = plan.devices.balloon
    if balloon is None or balloon.mib == 0:
        return []
    return [("balloon", size_argument(plan.memory_mib << 20, balloon.mib * PAGES_PER_MIB))]


def size_argument(memory: int, pages: int) -> Mapping[str, int]:
    """The argument of ``balloon`` for a balloon of so many pages."""
    return {"value": max(1, memory - pages * _PAGE)}


def parse_stats(found: Mapping[str, Any]) -> dict[str, int]:
    """QEMU's guest-stats under our names, without those the guest did not tell."""
    values = {ours: int(found.get(theirs, _UNKNOWN)) for theirs, ours in _STATISTICS.items()}
    return {name: value for name, value in values.items() if 0 <= value < _UNKNOWN}


def has_driver(found: Mapping[str, Any]) -> bool:
    """Whether the guest's driver runs the device, by the answer to x-query-virtio-status."""
    return any(str(bit).startswith("VIRTIO_CONFIG_S_DRIVER_OK") for bit in found["status"]["statuses"])
