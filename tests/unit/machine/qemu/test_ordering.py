"""Control lines and console bytes that were read together keep the order in which the guest wrote them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.effects import SerialOutput
from asyncvmm.machine.qemu.ordering import split_before_end


def output(data: bytes) -> SerialOutput:
    return SerialOutput("control", data, tuple(range(data.count(b"\n"))))


def test_the_workloads_start_comes_before_console_bytes_and_its_end_after() -> None:
    before, after = split_before_end([output(b"workload-pre-exec\nworkload-exit code=0\nheartbeat counter=1\n")])
    assert before == [SerialOutput("control", b"workload-pre-exec\n", (0,))]
    assert after == [SerialOutput("control", b"workload-exit code=0\nheartbeat counter=1\n", (1, 2))]


def test_a_boot_that_pid_1_ends_has_said_why_before() -> None:
    before, after = split_before_end([output(b"init-warning net=dhcp\ninit-error root=22\n")])
    assert before == [SerialOutput("control", b"init-warning net=dhcp\n", (0,))]
    assert after == [SerialOutput("control", b"init-error root=22\n", (1,))]


def test_lines_that_end_nothing_all_come_before() -> None:
    lines = [output(b"BOOT_TIME:ready:1\nREADY\n"), output(b"heartb")]
    assert split_before_end(lines) == (lines, [])


def test_a_beginning_that_may_become_the_end_comes_after() -> None:
    before, after = split_before_end([output(b"heartbeat counter=9\nworkload-e")])
    assert before == [SerialOutput("control", b"heartbeat counter=9\n", (0,))]
    assert after == [SerialOutput("control", b"workload-e")]


@given(
    st.lists(
        st.sampled_from(
            [b"READY\n", b"workload-exit code=1\n", b"init-error root=2\n", b"work", b"x", b"\n", b"\x0c\r"]
        ),
        max_size=8,
    )
)
def test_nothing_is_lost_or_reordered(pieces: list[bytes]) -> None:
    control = [output(piece) for piece in pieces]
    before, after = split_before_end(control)
    assert b"".join(part.data for part in [*before, *after]) == b"".join(pieces)
    assert sum(len(part.newlines) for part in [*before, *after]) == b"".join(pieces).count(b"\n")
