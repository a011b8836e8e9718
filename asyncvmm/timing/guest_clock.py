"""The guest's clock on the host's axis: host = guest + offset, with a bound on how far off that can be.

The offset is never known, only bounded. ``ClockPairing`` takes what bounds it:

* A line that says ``guest_ns`` was read by the host at ``host_ns``: the guest read its clock before that, so the offset
  is at most ``host_ns - guest_ns``. The smallest such difference, the line that was delayed least, is the estimate.
* A guest's CLOCK_MONOTONIC begins at 0 or above when its vCPUs first run (Linux, timekeeping_init), so the offset is at
  least the machine's start. A line that would put it lower is a lie and is ignored.
* A guest that by its TSC read its clock between two host instants bounds it from both sides.

The two clocks need not run at one rate, so every bound grows with the guest time between it and what it is used for:
``RATE_PPM``, 500 for either side, which is how far Linux slews a clock at most (adjtimex(2)) and how exact it wants the
calibration of a TSC to be.
"""

from __future__ import annotations

from typing import Literal

import attrs

RATE_PPM = 1000
"""How far the rates of the guest's and the host's clock may be apart, in parts per million."""

ClockSource = Literal["paired", "tsc"]


@attrs.frozen
class GuestClock:
    """host = guest + ``offset_ns``, off by at most ``error_ns``, for every boot stage the guest has told of.

    ``source``: ``paired`` from the arrival of the guest's lines, ``tsc`` from its time stamp counter.
    """

    offset_ns: int
    error_ns: int
    source: ClockSource

    def host_ns(self, guest_ns: int) -> int:
        """The host's time at ``guest_ns`` of the guest's clock."""
        return guest_ns + self.offset_ns


@attrs.frozen
class _Bracket:
    """At ``guest_ns`` the offset was at least ``low_ns`` and at most ``high_ns``."""

    guest_ns: int
    low_ns: int
    high_ns: int


class ClockPairing:
    """Gathers what bounds one guest's clock. Times are integer ns, the host's all on one axis.

    ``not_before_ns``: when the vCPUs ran at the earliest.
    """

    def __init__(self, not_before_ns: int) -> None:
        self._not_before_ns = not_before_ns
        self._least_ns: int | None = None
        self._first_guest_ns = 0
        self._last_guest_ns = 0
        self._tsc: _Bracket | None = None

    def pair(self, guest_ns: int, host_ns: int) -> bool:
        """A line that says ``guest_ns`` arrived at ``host_ns``. False if that cannot be."""
        most_ns = host_ns - guest_ns
        if guest_ns < 0 or most_ns < self._not_before_ns - _drift(guest_ns):
            return False
        first = self._least_ns is None
        self._least_ns = most_ns if self._least_ns is None else min(self._least_ns, most_ns)
        self._first_guest_ns = guest_ns if first else min(self._first_guest_ns, guest_ns)
        self._last_guest_ns = max(self._last_guest_ns, guest_ns)
        return True

    def read_between(self, guest_ns: int, earliest_ns: int, latest_ns: int, host_ns: int) -> bool:
        """By its TSC the guest read ``guest_ns`` between these two host times; its line came at ``host_ns``.

        False if that cannot be.
        """
        latest_ns = min(latest_ns, host_ns)
        low_ns = max(earliest_ns - guest_ns, self._not_before_ns - _drift(guest_ns))
        possible = self._not_before_ns <= earliest_ns <= latest_ns and low_ns <= latest_ns - guest_ns
        if not possible or not self.pair(guest_ns, host_ns):
            return False
        self._tsc = _Bracket(guest_ns, low_ns, latest_ns - guest_ns)
        return True

    @property
    def clock(self) -> GuestClock | None:
        """The best that can be said now; None before any line could be used."""
        if self._least_ns is None:
            return None
        return self._by_tsc(self._least_ns) or self._by_pairs(self._least_ns)

    def _by_tsc(self, least_ns: int) -> GuestClock | None:
        """Cut by the least delay. None if there is no reading, or if the lines' arrival contradicts it."""
        if self._tsc is None:
            return None
        drift = self._drift(self._tsc.guest_ns)
        low_ns, high_ns = self._tsc.low_ns, min(self._tsc.high_ns, least_ns + drift)
        if low_ns > high_ns:
            return None
        half = (high_ns - low_ns + 1) // 2
        return GuestClock(low_ns + half, half + drift, "tsc")

    def _by_pairs(self, least_ns: int) -> GuestClock:
        """The true offset lies between the lower bound and the least delay; the estimate is the latter."""
        error_ns = max(0, least_ns - self._not_before_ns) + self._drift(0)
        return GuestClock(least_ns, error_ns, "paired")

    def _drift(self, guest_ns: int) -> int:
        """How far the offset may move between ``guest_ns`` and any stage the guest has told of."""
        first, last = min(self._first_guest_ns, guest_ns), max(self._last_guest_ns, guest_ns)
        return _drift(last - first)


def _drift(span_ns: int) -> int:
    return -(-span_ns * RATE_PPM // 1_000_000)
