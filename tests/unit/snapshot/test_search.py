"""A regular expression in a stream: found wherever a search of the whole would find it, whatever the pieces."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ConfigError
from asyncvmm.snapshot.search import PAUSE_NS, WINDOW, StreamSearch, to_pattern


def found_in(pattern: bytes, pieces: list[bytes]) -> bytes | None:
    search = StreamSearch(to_pattern(pattern))
    found = None
    for turn, piece in enumerate(pieces):
        now_ns = turn * 3 * PAUSE_NS
        search.feed(piece, now_ns)
        found = search.look(now_ns)
        assert search.until_ns is None or found
    return found


@given(
    st.sampled_from([b"re+ady", b"^ab", rb"\bxy\b", b"a.b", b"login: $", b"ab|ba"]),
    st.lists(st.sampled_from([b"a", b"b", b"re", b"eady", b"x", b"y", b" ", b"login: ", b"\n"]), max_size=12),
)
def test_it_is_found_exactly_when_what_came_so_far_has_it(pattern: bytes, pieces: list[bytes]) -> None:
    prefixes = [b"".join(pieces[: count + 1]) for count in range(len(pieces))]
    expected = any(re.search(pattern, prefix) for prefix in prefixes)
    assert (found_in(pattern, pieces) is not None) == expected


@given(st.integers(0, 3 * WINDOW), st.integers(1, 200))
def test_a_match_across_pieces_is_found_behind_any_amount_of_output(before: int, size: int) -> None:
    stream = b"." * before + b"<" + b"-" * size + b">"
    pieces = [stream[at : at + 997] for at in range(0, len(stream), 997)]
    assert found_in(b"<-+>", pieces) == b"<" + b"-" * size + b">"


def test_the_start_is_the_stream_s_and_not_the_window_s() -> None:
    assert found_in(b"^x", [b"y" * WINDOW, b"x" * WINDOW, b"x" * WINDOW, b"x"]) is None
    assert found_in(b"(?m)^x", [b"y" * WINDOW + b"\n", b"x"]) == b"x"


def test_nothing_matches_over_a_gap() -> None:
    search = StreamSearch(to_pattern(b"ready|^x"))
    search.feed(b"rea", 0)
    assert search.look(0) is None
    search.feed(b"dy", PAUSE_NS, gap=True)
    assert search.look(PAUSE_NS) is None
    search.feed(b"x", 2 * PAUSE_NS, gap=True)
    assert search.look(2 * PAUSE_NS) is None
    search.feed(b" ready", 3 * PAUSE_NS)
    assert search.look(3 * PAUSE_NS) == b"ready"


def test_what_stood_before_a_gap_is_looked_at() -> None:
    search = StreamSearch(to_pattern(b"ready"))
    search.look(0)
    search.feed(b"ready", 0)
    search.feed(b"x", 0, gap=True)
    assert search.look(0) == b"ready"


def test_output_that_trickles_is_looked_at_now_and_then_and_no_byte_is_passed_over() -> None:
    search = StreamSearch(to_pattern(b"z{3}"))
    looks = 0
    for turn, byte in enumerate(b"a" * 1000 + b"zzz"):
        now_ns = turn * PAUSE_NS // 100
        search.feed(bytes([byte]), now_ns)
        looks += search.until_ns is not None and now_ns >= search.until_ns
        assert search.look(now_ns) is None
    assert looks <= 12
    assert search.until_ns is not None
    assert search.look(search.until_ns) == b"zzz"


def test_memory_is_bounded_however_much_comes_between_two_looks() -> None:
    search = StreamSearch(to_pattern(b"zzz"))
    search.feed(b"a" * (1 << 20), 0)
    assert len(search._held) <= 4 * WINDOW
    search.feed(b"zzz" + b"b" * (1 << 20), 0)
    assert search.look(0) == b"zzz"


@pytest.mark.parametrize("wrong", ["text", re.compile("text"), b"(", b"", b"x*", b"$", None, 5])
def test_what_is_no_pattern_or_matches_nothing_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError):
        to_pattern(wrong)


def test_a_compiled_pattern_keeps_its_flags() -> None:
    search = StreamSearch(to_pattern(re.compile(b"ready", re.IGNORECASE)))
    search.feed(b"READY", 0)
    assert search.look(0) == b"READY"
