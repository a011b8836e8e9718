"""PortWatches: who waits for the guest to write to an I/O port without a device. Each is told once, on the loop."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from asyncvmm.bus import Bus

Told = Callable[[int], None]


@attrs.define(eq=False)
class _Watch:
    port: int
    value: int | None
    told: Told
    hit: bool = False


@attrs.frozen
class PortWritten:
    """The byte ``value`` was written, which ``watch`` waits for: a notice on its way to the loop."""

    watch: _Watch
    value: int


class PortWatches:
    """Those of one machine. ``post`` takes a notice on a vCPU thread and has ``hand`` called with it on the loop."""

    def __init__(self, post: Callable[[PortWritten], object]) -> None:
        self._post = post
        self._watches: dict[int, tuple[_Watch, ...]] = {}

    def add(self, bus: Bus, port: int, value: int | None, told: Told) -> Callable[[], None]:
        """Have ``told`` called with the next byte that the guest writes to ``port``: ``value``, or any for None.

        Returns what ends that. Raises ConfigError if a device is at that port.
        """
        watch = _Watch(port, value, told)
        bus.watch(port, lambda written: self._written(port, written))
        self._watches[port] = (*self._watches.get(port, ()), watch)
        return lambda: self._remove(bus, watch)

    def hand(self, notice: PortWritten) -> None:
        """Tell who waits, unless it does no longer."""
        watch = notice.watch
        if watch in self._watches.get(watch.port, ()):
            watch.told(notice.value)

    def _remove(self, bus: Bus, watch: _Watch) -> None:
        left = tuple(other for other in self._watches.get(watch.port, ()) if other is not watch)
        self._watches[watch.port] = left
        if not left:
            del self._watches[watch.port]
            bus.unwatch(watch.port)

    def _written(self, port: int, value: int) -> None:
        # On a vCPU thread: each watch posts once, so that no guest can flood the loop.
        for watch in self._watches.get(port, ()):
            if not watch.hit and watch.value in (None, value):
                watch.hit = True
                self._post(PortWritten(watch, value))
