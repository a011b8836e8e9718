from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.host_clock import LOOKS, TIGHT_NS, realtime_ahead_ns

AHEAD_NS = 1_795_000_000_000_000_000


def clocks(gaps: list[int]) -> tuple[Callable[[], int], Callable[[], int]]:
    """CLOCK_MONOTONIC and CLOCK_REALTIME, AHEAD_NS apart, of a thread that loses its processor for ``gaps`` ns, one
    after each look at either."""
    now, left = 0, iter(gaps)

    def monotonic() -> int:
        nonlocal now
        seen = now
        now += next(left, 0)
        return seen

    return monotonic, lambda: monotonic() + AHEAD_NS


def test_a_thread_that_loses_its_processor_between_two_clocks_looks_again() -> None:
    assert abs(realtime_ahead_ns(*clocks([28_000_000])) - AHEAD_NS) <= TIGHT_NS
    assert abs(realtime_ahead_ns(*clocks([100, 28_000_000])) - AHEAD_NS) <= TIGHT_NS


@given(st.lists(st.integers(0, 10**9), max_size=3 * LOOKS))
def test_the_tightest_look_counts(gaps: list[int]) -> None:
    padded = [*gaps, *[0] * (3 * LOOKS - len(gaps))]
    tightest = min(sum(padded[3 * look : 3 * look + 2]) for look in range(LOOKS))
    assert abs(realtime_ahead_ns(*clocks(gaps)) - AHEAD_NS) <= max(tightest, TIGHT_NS)


def test_it_is_what_the_hosts_clocks_say() -> None:
    before = time.time_ns() - time.monotonic_ns()
    assert abs(realtime_ahead_ns() - before) < 10**9
