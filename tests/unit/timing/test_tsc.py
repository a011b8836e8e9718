from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncvmm.timing.tsc import U64, ClockSample, GuestTime, TscOffset, guest_time, host_instant, offset_from_zero

GHZ_3 = 3
EXACT = TscOffset.of(-1_000_000)

# The host: 1..5 cycles a nanosecond, by a rate that changes at most once, by at most SLEW_PPM.
rates = st.fractions(1, 5, max_denominator=1000)
slews = st.integers(-500, 500)
spans = st.integers(1_000, 5_000_000_000)
widths = st.integers(0, 10_000)
u64 = st.integers(0, U64 - 1)


class Host:
    """A clock of ``rate`` cycles a nanosecond, slewed by ``before`` ppm until ``change_ns`` and ``after`` ppm then."""

    def __init__(self, rate: Fraction, before: int, after: int, change_ns: int) -> None:
        self.rate, self.change_ns = rate, change_ns
        self.before, self.after = Fraction(1_000_000 + before, 1_000_000), Fraction(1_000_000 + after, 1_000_000)

    def monotonic(self, real_ns: int) -> Fraction:
        return min(real_ns, self.change_ns) * self.before + max(0, real_ns - self.change_ns) * self.after

    def tsc(self, real_ns: int) -> int:
        return int(real_ns * self.rate)

    def sample(self, real_ns: int, before_ns: int, after_ns: int) -> ClockSample:
        return ClockSample(self.tsc(real_ns - before_ns), int(self.monotonic(real_ns)), self.tsc(real_ns + after_ns))


hosts = st.builds(Host, rates, slews, slews, st.integers(0, 10_000_000_000))


@given(hosts, spans, spans, st.tuples(widths, widths, widths, widths), st.integers(0, 5_000), u64)
def test_the_truth_lies_within_the_bound(
    host: Host, until_ns: int, after_ns: int, sandwich: tuple[int, ...], unsure: int, offset: int
) -> None:
    start_ns = 1_000_000
    first = host.sample(start_ns, sandwich[0], sandwich[1])
    last = host.sample(start_ns + until_ns + after_ns, sandwich[2], sandwich[3])
    true = TscOffset.of(offset)
    known = TscOffset(true.low - unsure, true.low + unsure // 2)
    found = host_instant(host.tsc(start_ns + until_ns) + true.low, known, first, last)
    if found is not None:
        instant_ns, error_ns = found
        assert abs(instant_ns - host.monotonic(start_ns + until_ns)) <= error_ns + 2


def test_between_two_samples_time_is_in_proportion() -> None:
    first, last = ClockSample(3_000, 1_000, 3_000), ClockSample(6_000, 2_000, 6_000)
    found = host_instant(4_500 - 1_000_000, EXACT, first, last)
    assert found is not None
    assert found[0] == 1_500


@pytest.mark.parametrize("tsc", [2_999, 6_001, 0, U64 - 1])
def test_outside_of_the_samples_nothing_is_said(tsc: int) -> None:
    first, last = ClockSample(3_000, 1_000, 3_000), ClockSample(6_000, 2_000, 6_000)
    assert host_instant(tsc, TscOffset.of(0), first, last) is None


@given(u64, u64, st.tuples(u64, u64, u64), st.tuples(u64, u64, u64))
@example(5, 0, (5, 5, 5), (5, 5, 5))
@example(8, 0, (8, 1, 0), (20, 9, 12))
def test_no_values_raise(tsc: int, offset: int, first: tuple[int, int, int], last: tuple[int, int, int]) -> None:
    found = host_instant(tsc, TscOffset.of(offset), ClockSample(*first), ClockSample(*last))
    assert found is None or found[1] >= 0


@given(hosts, spans, spans, spans, st.tuples(widths, widths, widths, widths), widths)
def test_the_offset_of_a_counter_that_began_at_zero_is_enclosed(
    host: Host, before_ns: int, until_ns: int, after_ns: int, sandwich: tuple[int, ...], early_ns: int
) -> None:
    start_ns = 1_000_000
    zero_ns = start_ns + before_ns
    first = host.sample(start_ns, sandwich[0], sandwich[1])
    last = host.sample(zero_ns + until_ns + sandwich[2] + after_ns, sandwich[2], sandwich[3])
    offset = offset_from_zero(first, int(host.monotonic(zero_ns)) - early_ns, last)
    assert offset is not None
    assert offset.low <= -host.tsc(zero_ns) <= offset.high


def test_an_early_bound_that_is_none_counts_as_the_first_sample() -> None:
    first, last = ClockSample(3_000, 1_000, 3_030), ClockSample(6_000, 2_000, 6_030)
    assert offset_from_zero(first, 0, last) == TscOffset(-6_030, -3_000)
    assert offset_from_zero(last, 0, first) is None


@pytest.mark.parametrize(("value", "signed"), [(0, 0), (U64 - 5, -5), (-5, -5), (1 << 62, 1 << 62)])
def test_an_offset_is_taken_as_signed(value: int, signed: int) -> None:
    assert TscOffset.of(value) == TscOffset(signed, signed)


def test_the_guest_s_time_is_the_host_s_at_one_value_of_both_counters() -> None:
    now = guest_time(ClockSample(1000, 50, 1002), 7_000, TscOffset.of(-300), 2_000_000)
    assert now == GuestTime(realtime_ns=7_050, tsc=701, khz=2_000_000)
    assert guest_time(ClockSample(10, 50, 10), 0, TscOffset.of(-20), 1).tsc == U64 - 10
