from __future__ import annotations

import itertools
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.events.lines import Line, LineScanner, Tail

CAP = 8

streams = st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r", b"\r\n", b"\xff", b"x" * 9, b"\0"]), max_size=40).map(
    b"".join
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def one_byte_at_a_time(data: bytes) -> list[Line]:
    """The definition, as plainly as it can be said: newline number n comes at time n."""
    lines = []
    for number, raw in enumerate(data.split(b"\n")[:-1]):
        lines.append(Line(raw[:CAP].rstrip(b"\r"), number, len(raw) > CAP))
    return lines


@given(streams, st.lists(st.integers(0, 1000), max_size=10))
def test_how_the_stream_is_chunked_makes_no_difference(data: bytes, places: list[int]) -> None:
    scanner, lines, seen = LineScanner(CAP), [], 0
    for chunk in cut(data, places):
        newlines = chunk.count(b"\n")
        lines += scanner.feed(chunk, range(seen, seen + newlines))
        seen += newlines
    assert lines == one_byte_at_a_time(data)
    assert scanner.truncated == sum(line.truncated for line in lines)


def test_each_line_has_the_time_of_its_newline() -> None:
    scanner = LineScanner()
    assert scanner.feed(b"one\ntw", [10]) == [Line(b"one", 10)]
    assert scanner.pending == b"tw"
    assert scanner.feed(b"o\r\n\n", [20, 30]) == [Line(b"two", 20), Line(b"", 30)]


def test_missing_times_repeat_the_last_one_and_spare_ones_are_ignored() -> None:
    scanner = LineScanner()
    assert [line.t_ns for line in scanner.feed(b"a\nb\nc\n", [5])] == [5, 5, 5]
    assert [line.t_ns for line in scanner.feed(b"a\n")] == [0]
    assert [line.t_ns for line in scanner.feed(b"a\n", [1, 2, 3])] == [1]


def test_a_line_of_exactly_the_cap_is_whole_and_one_byte_more_is_not() -> None:
    scanner = LineScanner(4)
    assert scanner.feed(b"abcd\nabcde\nab\n", [1, 2, 3]) == [
        Line(b"abcd", 1),
        Line(b"abcd", 2, truncated=True),
        Line(b"ab", 3),
    ]
    assert scanner.truncated == 1


def test_a_gigabyte_without_a_newline_stays_small() -> None:
    scanner, tail, chunk = LineScanner(), Tail(), b"x" * (1 << 20)
    tracemalloc.start()
    try:
        for _ in range(1024):
            assert scanner.feed(chunk) == []
            tail.feed(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert scanner.feed(b"y\nnext\n", [1, 2]) == [Line(b"x" * 4096, 1, truncated=True), Line(b"next", 2)]


def test_a_line_with_bytes_lost_in_it_is_marked_and_the_next_is_whole() -> None:
    scanner = LineScanner()
    scanner.feed(b"BOOT_TIME:ready:1")
    scanner.gap()
    assert scanner.feed(b"23\nREADY\n", [1, 2]) == [Line(b"BOOT_TIME:ready:123", 1, truncated=True), Line(b"READY", 2)]


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", None]), max_size=30))
def test_lost_bytes_spoil_the_line_they_were_in_and_no_other(pieces: list[bytes | None]) -> None:
    scanner, lines, spoilt, expected = LineScanner(), list[Line](), False, list[bool]()
    for piece in pieces:
        if piece is None:
            scanner.gap()
            spoilt = True
            continue
        lines += scanner.feed(piece, [0])
        if piece.endswith(b"\n"):
            expected.append(spoilt)
            spoilt = False
    assert [line.truncated for line in lines] == expected


def test_carriage_returns_go_from_the_end_of_a_line_and_from_nowhere_else() -> None:
    (line,) = LineScanner().feed(b"\rREA\rDY\r\r\n", [1])
    assert line == Line(b"\rREA\rDY", 1)


def test_the_end_of_the_stream_gives_its_unfinished_line() -> None:
    scanner = LineScanner()
    assert scanner.flush(1) is None
    scanner.feed(b"login: ")
    assert scanner.flush(2) == Line(b"login: ", 2)
    assert scanner.flush(3) is None


@given(st.lists(st.binary(max_size=20)), st.integers(1, 16))
def test_a_tail_is_the_end_of_everything_fed(chunks: list[bytes], size: int) -> None:
    tail = Tail(size)
    for chunk in chunks:
        tail.feed(chunk)
    assert bytes(tail) == b"".join(chunks)[-size:]
