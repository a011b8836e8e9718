"""Lines that others have written: what is an event of asyncvmm, and what is not."""

from __future__ import annotations

from contextlib import suppress

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.events.encoding import to_line
from asyncvmm.events.types import PhaseEnded
from asyncvmm.export.records import NotARecord, counts, number, read_record, record_of, text

GOOD = {"v": 1, "ts": "2026-11-21T02:25:33.123456Z", "t_ns": 5, "vm": "a", "event": "guest.ready"}


def test_a_line_of_ours_is_a_record() -> None:
    assert read_record(to_line(PhaseEnded(9, "boot", 2, 7), "vm", 0))["duration_ns"] == 7


def test_an_event_and_its_line_give_the_same_record() -> None:
    event = PhaseEnded(9, "boot", 2, 7, parent="total")
    line = dict(read_record(to_line(event, "vm", 0)))
    for name in ("v", "ts", "vm"):
        del line[name]
    assert record_of(event) == line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "not JSON"),
        (b"GET / HTTP/1.1", "not JSON"),
        (b'{"v":1,"t_ns":5,"vm":"a","ev', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not an event"),
        (b"17", "not an event"),
        (b'{"level":"info"}', "not an event"),
        (orjson.dumps(GOOD | {"v": 2}), "another version"),
        (orjson.dumps(GOOD | {"v": True}), "another version"),
        (orjson.dumps(GOOD | {"t_ns": -1}), "t_ns"),
        (orjson.dumps(GOOD | {"t_ns": 1.5}), "t_ns"),
        (orjson.dumps(GOOD | {"t_ns": "5"}), "t_ns"),
        (orjson.dumps(GOOD | {"t_ns": True}), "t_ns"),
        (orjson.dumps(GOOD | {"t_ns": 1 << 63}), "t_ns"),
        (orjson.dumps(GOOD | {"vm": 3}), "vm"),
        (orjson.dumps(GOOD | {"vm": "x" * 2000}), "vm is too long"),
        (orjson.dumps(GOOD | {"event": None}), "event"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_event_is_refused_by_name(line: bytes, said: str) -> None:
    with pytest.raises(NotARecord, match=said):
        read_record(line)


@given(st.binary())
def test_any_bytes_are_a_record_or_refused(line: bytes) -> None:
    with suppress(NotARecord):
        assert read_record(line)["v"] == 1


def test_fields_are_checked_where_they_are_read() -> None:
    with pytest.raises(NotARecord, match="stage is not text"):
        text({"stage": 1}, "stage")
    with pytest.raises(NotARecord, match="duration_ns"):
        number({}, "duration_ns")
    with pytest.raises(NotARecord, match="exits"):
        counts({"exits": [1]}, "exits")
    with pytest.raises(NotARecord, match="IO"):
        counts({"exits": {"IO": float("inf")}}, "exits")
    assert counts({}, "exits") == {}
