"""The token bucket, against what a second's worth is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.token_bucket import TokenBucket


class Clock:
    ns = 0

    def __call__(self) -> int:
        return self.ns


def test_a_bucket_is_full_at_first_and_says_when_to_come_again() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 5, clock)
    assert bucket.take(5) == 0
    assert bucket.take(1) == 100_000_000
    clock.ns += 99_999_999
    assert bucket.take(1) == 1
    clock.ns += 1
    assert bucket.take(1) == 0


@given(
    st.integers(1, 1 << 30),
    st.integers(1, 1 << 20),
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 1 << 20)), max_size=30),
)
def test_never_more_than_the_burst_and_the_rate_and_never_less_if_waited_for(
    rate: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    taken = 0
    for pause_ns, wanted in steps:
        clock.ns += pause_ns
        tokens = min(wanted, burst)
        wait_ns = bucket.take(tokens)
        if wait_ns:
            clock.ns += wait_ns
            assert bucket.take(tokens) == 0, "the time it named is enough"
        taken += tokens
        assert taken * 10**9 <= burst * 10**9 + clock.ns * rate
