"""From a processor's time stamp counter to CLOCK_MONOTONIC, by two sampled pairs and what lies between them.

TSC: Intel SDM volume 3, "Time-Stamp Counter", invariant and the same on all processors. CLOCK_MONOTONIC follows it
at a rate that NTP slews; between two samples close to what is asked, that and any wrong idea of the TSC's frequency
cancel.
"""

from __future__ import annotations

import attrs

SLEW_PPM = 1000
"""How far CLOCK_MONOTONIC's rate may change between two samples: from 500 ppm below to 500 ppm above (adjtimex(2))."""

U64 = 1 << 64


@attrs.frozen
class ClockSample:
    """CLOCK_MONOTONIC read ``ns`` somewhere between the TSC values ``tsc`` and ``tsc_end``."""

    tsc: int
    ns: int
    tsc_end: int


@attrs.frozen
class TscOffset:
    """What KVM adds to the host's TSC for a guest (modulo 2^64) lies between ``low`` and ``high``, taken as signed."""

    low: int
    high: int

    @classmethod
    def of(cls, value: int) -> TscOffset:
        """An offset known exactly, signed or not."""
        signed = (value + (U64 >> 1)) % U64 - (U64 >> 1)
        return cls(signed, signed)


@attrs.frozen
class GuestTime:
    """CLOCK_REALTIME of the host was ``realtime_ns`` when a guest's TSC, which counts ``khz`` kHz, was ``tsc``."""

    realtime_ns: int
    tsc: int
    khz: int


def guest_time(now: ClockSample, realtime_ahead_ns: int, offset: TscOffset, khz: int) -> GuestTime:
    """The guest's TSC now. ``realtime_ahead_ns``: CLOCK_REALTIME less CLOCK_MONOTONIC."""
    tsc = (now.tsc + now.tsc_end) // 2 + (offset.low + offset.high) // 2
    return GuestTime(now.ns + realtime_ahead_ns, tsc % U64, khz)


def host_instant(guest_tsc: int, offset: TscOffset, first: ClockSample, last: ClockSample) -> tuple[int, int] | None:
    """CLOCK_MONOTONIC ns when a guest's TSC was ``guest_tsc``, and the most that may be wrong with it in ns.

    None unless that was between the two samples, which a guest cannot help if it tells the truth.
    """
    begin, end = (first.tsc + first.tsc_end) // 2, (last.tsc + last.tsc_end) // 2
    low, high = max(guest_tsc - offset.high, first.tsc), min(guest_tsc - offset.low, last.tsc_end)
    if low > high or end <= begin or last.ns <= first.ns:
        return None
    span_tsc, span_ns = end - begin, last.ns - first.ns
    tsc = (low + high) // 2
    instant_ns = first.ns + (tsc - begin) * span_ns // span_tsc
    wrong_tsc = max(0, first.tsc_end - first.tsc, last.tsc_end - last.tsc) + high - low
    slew_ns = max(0, min(tsc - begin, end - tsc)) * span_ns // span_tsc * SLEW_PPM // 1_000_000
    return instant_ns, (wrong_tsc // 2 + 1) * span_ns // span_tsc + slew_ns + 2


def offset_from_zero(first: ClockSample, earliest_ns: int, last: ClockSample) -> TscOffset | None:
    """The offset of a TSC that began at 0 after ``earliest_ns`` and before ``last``. None if that is no time at all.

    ``earliest_ns``, CLOCK_MONOTONIC, counts as far as it lies between the two samples.
    """
    begin, end = first.tsc, last.tsc_end
    if end <= begin or last.ns <= first.ns:
        return None
    since_ns = min(max(earliest_ns, first.ns), last.ns) - first.ns
    left_ns = last.ns - first.ns - since_ns
    # From the later sample back: it is the closer one, so that slewing matters less.
    back_ns = left_ns + left_ns * SLEW_PPM // 1_000_000 + 1
    zero = last.tsc - -(-back_ns * (end - begin) // (last.ns - first.ns))
    return TscOffset(-end, -max(begin, zero))
