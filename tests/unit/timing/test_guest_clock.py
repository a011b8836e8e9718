from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncvmm.timing.guest_clock import RATE_PPM, ClockPairing, GuestClock

U64_MAX = (1 << 64) - 1
SECOND = 1_000_000_000
START = 5_000

times = st.integers(0, 10 * SECOND)
delays = st.integers(0, SECOND)
anything = st.integers(-(1 << 70), 1 << 70)


class World:
    """A guest whose clock began ``lead_ns`` after its vCPUs and runs ``ppm`` fast or slow, and what is heard of it."""

    def __init__(self, lead_ns: int, ppm: int) -> None:
        self.zero_ns = START + lead_ns
        self.ppm = ppm
        self.pairing = ClockPairing(START)
        self.said: list[int] = []

    def host_ns(self, guest_ns: int) -> int:
        return self.zero_ns + guest_ns + guest_ns * self.ppm // 1_000_000

    def say(self, guest_ns: int, delay_ns: int) -> None:
        assert self.pairing.pair(guest_ns, self.host_ns(guest_ns) + delay_ns)
        self.said.append(guest_ns)

    def assert_within_bound(self) -> GuestClock:
        clock = self.pairing.clock
        assert clock is not None
        for guest_ns in self.said:
            assert abs(clock.host_ns(guest_ns) - self.host_ns(guest_ns)) <= clock.error_ns + 1
        return clock


worlds = st.builds(World, delays, st.integers(-RATE_PPM, RATE_PPM))
lines = st.lists(st.tuples(times, delays), min_size=1, max_size=8)


@given(worlds, lines)
def test_whatever_the_delays_the_truth_lies_within_the_bound(world: World, lines: list[tuple[int, int]]) -> None:
    for guest_ns, delay_ns in lines:
        world.say(guest_ns, delay_ns)
    assert world.assert_within_bound().source == "paired"


@given(worlds, lines, times, delays, delays, delays)
def test_a_tsc_reading_keeps_the_truth_within_the_bound(
    world: World, lines: list[tuple[int, int]], guest_ns: int, before_ns: int, after_ns: int, delay_ns: int
) -> None:
    host_ns = world.host_ns(guest_ns)
    earliest_ns = max(START, host_ns - before_ns)
    assert world.pairing.read_between(guest_ns, earliest_ns, host_ns + after_ns, host_ns + delay_ns)
    world.said.append(guest_ns)
    for line in lines:
        world.say(*line)
    assert world.assert_within_bound().source == "tsc"


def test_the_line_delayed_least_gives_the_offset() -> None:
    pairing = ClockPairing(0)
    for guest_ns, delay_ns in ((100, 30), (200, 7), (300, 50)):
        pairing.pair(guest_ns, 1000 + guest_ns + delay_ns)
    clock = pairing.clock
    assert clock is not None
    assert clock.offset_ns == 1007
    assert clock.host_ns(200) == 1207


def test_the_bound_of_a_pairing_reaches_down_to_the_start_of_the_vcpus() -> None:
    pairing = ClockPairing(400)
    pairing.pair(0, 1000)
    assert pairing.clock == GuestClock(1000, 600, "paired")


def test_a_delay_common_to_all_lines_makes_the_bound_grow_by_as_much() -> None:
    prompt, late = ClockPairing(0), ClockPairing(0)
    for guest_ns in (0, 100):
        prompt.pair(guest_ns, 1000 + guest_ns)
        late.pair(guest_ns, 1000 + guest_ns + 300)
    assert prompt.clock is not None
    assert late.clock is not None
    assert late.clock.error_ns == prompt.clock.error_ns + 300


def test_the_least_delay_cuts_the_bracket_of_a_tsc_reading() -> None:
    pairing = ClockPairing(0)
    pairing.read_between(10, 110, 210, 500)
    pairing.pair(10, 130)
    assert pairing.clock == GuestClock(110, 10, "tsc")


def test_a_tsc_reading_gives_the_middle_of_its_bracket() -> None:
    pairing = ClockPairing(0)
    pairing.pair(10, 500)
    pairing.read_between(10, 110, 121, 500)
    assert pairing.clock == GuestClock(106, 6, "tsc")


def test_the_bound_grows_with_the_distance_of_the_stages() -> None:
    pairing = ClockPairing(0)
    pairing.read_between(SECOND, 3 * SECOND, 3 * SECOND, 3 * SECOND)
    pairing.pair(2 * SECOND, 5 * SECOND)
    clock = pairing.clock
    assert clock is not None
    assert clock.error_ns == SECOND * RATE_PPM // 1_000_000


def test_a_reading_that_the_lines_arrival_contradicts_is_not_used() -> None:
    pairing = ClockPairing(0)
    pairing.read_between(0, 5 * SECOND, 5 * SECOND, 6 * SECOND)
    pairing.pair(0, SECOND)
    clock = pairing.clock
    assert clock is not None
    assert (clock.source, clock.offset_ns) == ("paired", SECOND)


@pytest.mark.parametrize("guest_ns", [U64_MAX, 10 * SECOND, -1])
def test_a_time_the_guest_cannot_have_read_is_ignored(guest_ns: int) -> None:
    pairing = ClockPairing(START)
    assert not pairing.pair(guest_ns, START + SECOND)
    assert pairing.clock is None


@pytest.mark.parametrize(
    ("earliest_ns", "latest_ns", "host_ns"),
    [(START - 1, START, SECOND), (SECOND, SECOND - 1, 2 * SECOND), (3 * SECOND, 3 * SECOND, 2 * SECOND)],
    ids=["before the start", "backwards", "after its line"],
)
def test_a_reading_that_cannot_be_is_ignored(earliest_ns: int, latest_ns: int, host_ns: int) -> None:
    pairing = ClockPairing(START)
    assert not pairing.read_between(0, earliest_ns, latest_ns, host_ns)
    assert pairing.clock is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("pair"), anything, anything),
            st.tuples(st.just("read_between"), anything, anything, anything, anything),
        )
    )
)
@example([("pair", U64_MAX, 2 * U64_MAX), ("pair", 0, U64_MAX)])
@example([("read_between", 10, START, START, START + 9)])
def test_a_lying_guest_raises_nothing_and_moves_its_clock_within_its_life_only(calls: list[tuple[object, ...]]) -> None:
    pairing = ClockPairing(START)
    latest_ns = START
    for name, *arguments in calls:
        if getattr(pairing, str(name))(*arguments):
            latest_ns = max(latest_ns, int(str(arguments[-1])))
        clock = pairing.clock
        if clock is not None:
            assert START - (latest_ns >> 9) <= clock.offset_ns <= latest_ns
            assert clock.error_ns >= 0
