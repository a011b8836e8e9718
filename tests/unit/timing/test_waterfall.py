"""A boot's lines become rows by start, nested phases indented; what is not understood is remarked upon, never fatal."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.timing.waterfall import BAR_WIDTH, MAX_REMARKS, Row, read_waterfall, render


def line(event: str, t_ns: int, vm: str = "a1b2", **fields: object) -> bytes:
    return orjson.dumps({"v": 1, "t_ns": t_ns, "vm": vm, "event": event, **fields}) + b"\n"


def phase(name: str, start_ns: int, duration_ns: int, parent: str | None = None) -> bytes:
    return line("phase", start_ns + duration_ns, name=name, start_ns=start_ns, duration_ns=duration_ns, parent=parent)


BOOT = [
    phase("inner", 2_000_000, 1_000_000, "outer"),
    phase("outer", 1_000_000, 3_000_000),
    line("guest.boot_time", 5_000_000, stage="init_entry", guest_ns=1),
    line("guest.ready", 6_000_000),
    line("guest.heartbeat", 7_000_000, counter=1),
]


def test_rows_stand_by_start_and_know_their_depth() -> None:
    waterfall = read_waterfall(BOOT)
    assert waterfall.vm == "a1b2"
    assert waterfall.remarks == ()
    assert waterfall.rows == (
        Row("outer", 1_000_000, 3_000_000, 0),
        Row("inner", 2_000_000, 1_000_000, 1),
        Row("guest init_entry", 5_000_000),
        Row("READY", 6_000_000),
    )


def test_each_row_is_a_line_with_start_duration_and_label() -> None:
    lines = render(read_waterfall(BOOT)).splitlines()
    assert lines[0] == "VM a1b2: 6.0 ms"
    assert [text.split()[-1] for text in lines[2:]] == ["outer", "inner", "init_entry", "READY"]
    assert lines[2].split()[:2] == ["1.000", "3.000"]
    assert "━" * (BAR_WIDTH // 2) in lines[2]


def test_nothing_to_show_is_said() -> None:
    assert render(read_waterfall([])) == "no phases and no guest stages"


def test_foreign_lines_and_other_vms_are_remarked_upon() -> None:
    lines = [b"no JSON\n", b"[]\n", line("guest.ready", 1), line("guest.ready", 2, vm="other"), b'{"t_ns":"x"}\n']
    waterfall = read_waterfall(lines)
    assert [remark.split(":")[0] for remark in waterfall.remarks] == ["line 1", "line 2", "line 4", "line 5"]
    assert len(waterfall.rows) == 1


@pytest.mark.parametrize(("more", "said"), [(1, "and 1 more line"), (5000, "and 5000 more lines")])
def test_of_many_foreign_lines_the_first_are_named_and_the_others_counted(more: int, said: str) -> None:
    waterfall = read_waterfall([b"no JSON\n"] * (MAX_REMARKS + more) + BOOT)
    assert waterfall.remarks[:-1] == tuple(f"line {n}: not an event of asyncvmm" for n in range(1, MAX_REMARKS + 1))
    assert waterfall.remarks[-1] == said
    assert len(waterfall.rows) == 4


def test_phases_that_are_each_others_parent_do_not_hang_it() -> None:
    waterfall = read_waterfall([phase("a", 1, 1, "b"), phase("b", 1, 1, "a")])
    assert len(waterfall.rows) == 2


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
fields = st.dictionaries(
    st.sampled_from(["v", "t_ns", "vm", "event", "name", "parent", "start_ns", "duration_ns", "stage", "what", "code"]),
    json | st.sampled_from(["phase", "guest.ready", "guest.boot_time", "vm.error"]),
)


@given(st.lists(st.binary(max_size=40) | fields.map(lambda event: orjson.dumps(event))))
def test_whatever_a_file_holds_it_is_drawn(lines: list[bytes]) -> None:
    render(read_waterfall(lines))
