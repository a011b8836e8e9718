from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.effects import SerialOutput
from asyncvmm.machine.kvm.interleave import Taken, interleave


def test_nothing_gives_nothing() -> None:
    assert interleave(Taken(), Taken(), []) == []


def test_one_port_alone_is_one_effect() -> None:
    console = Taken(b"a\nb", (5,), 0, 100)
    assert interleave(console, Taken(), []) == [SerialOutput("console", b"a\nb", (5,))]


def test_a_control_line_comes_between_what_was_written_before_and_after_it() -> None:
    console = Taken(b"before\nafter\n", (1, 3), 0, 1000)
    control = Taken(b"READY\n", (2,))
    assert interleave(console, control, [1007]) == [
        SerialOutput("console", b"before\n", (1,)),
        SerialOutput("control", b"READY\n", (2,)),
        SerialOutput("console", b"after\n", (3,)),
    ]


def test_a_mark_in_bytes_that_went_out_earlier_puts_the_control_line_first() -> None:
    effects = interleave(Taken(b"later", (), 0, 50), Taken(b"x\n", (1,)), [20])
    assert [effect.port for effect in effects] == ["control", "console"]


def test_an_unfinished_control_line_comes_last() -> None:
    effects = interleave(Taken(b"abc", first=0), Taken(b"x\nunfinished", (1,)), [1])
    assert effects == [
        SerialOutput("console", b"a"),
        SerialOutput("control", b"x\n", (1,)),
        SerialOutput("console", b"bc"),
        SerialOutput("control", b"unfinished"),
    ]


def test_control_lines_beyond_the_recorded_marks_come_in_one_piece() -> None:
    effects = interleave(Taken(b"ab"), Taken(b"1\n2\n3\n", (7,)), [1])
    assert effects[-1] == SerialOutput("control", b"2\n3\n")


def test_losses_are_told_even_without_bytes() -> None:
    assert interleave(Taken(lost=3), Taken(lost=4), []) == [
        SerialOutput("console", b"", (), 3),
        SerialOutput("control", b"", (), 4),
    ]


SCRIPT = st.lists(
    st.tuples(st.sampled_from(["console", "control"]), st.binary(min_size=1, max_size=4).map(lambda b: b + b"\n")),
    max_size=12,
)


@given(script=SCRIPT, first=st.integers(0, 10_000))
def test_whatever_the_guest_writes_in_lines_comes_out_in_its_order(script: list[tuple[str, bytes]], first: int) -> None:
    written = {"console": b"", "control": b""}
    times: dict[str, list[int]] = {"console": [], "control": []}
    marks = []
    for now, (port, line) in enumerate(script):
        written[port] += line
        times[port] += [now] * line.count(b"\n")
        if port == "control":
            marks += [first + len(written["console"])] * line.count(b"\n")
    effects = interleave(
        Taken(written["console"], tuple(times["console"]), 0, first),
        Taken(written["control"], tuple(times["control"])),
        marks,
    )
    for port in ("console", "control"):
        mine = [effect for effect in effects if effect.port == port]
        assert b"".join(effect.data for effect in mine) == written[port]
        assert [time for effect in mine for time in effect.newlines] == times[port]
        assert all(len(effect.newlines) == effect.data.count(b"\n") for effect in mine)
    in_order = [time for effect in effects for time in effect.newlines]
    assert in_order == sorted(in_order)
