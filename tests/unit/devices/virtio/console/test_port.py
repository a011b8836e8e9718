"""One port's bytes, against a plain string of them."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.virtio.console.port import BACKLOG_BYTES, ConsolePort

STEPS = st.lists(st.binary(min_size=1, max_size=20) | st.integers(1, 30), max_size=40)


@given(STEPS)
def test_what_comes_out_is_what_went_in(steps: list[bytes | int]) -> None:
    port, went_in, came_out = ConsolePort(1, "data"), b"", b""
    port.host_open = True
    for step in steps:
        if isinstance(step, bytes):
            assert port.append(step) == 0
            went_in += step
        elif port.backlog:
            taken = port.take(step)
            assert 1 <= len(taken) <= step
            came_out += taken
        assert port.backlog == len(went_in) - len(came_out) == sum(map(len, port.pieces))
    while port.backlog:
        came_out += port.take(7)
    assert came_out == went_in


@given(STEPS)
def test_a_console_that_nobody_reads_keeps_its_newest_bytes(steps: list[bytes | int]) -> None:
    port, went_in = ConsolePort(0, "console", is_console=True, limit=32), b""
    for step in steps:
        if isinstance(step, bytes):
            port.append(step)
            went_in += step
    assert port.lost == max(0, len(went_in) - 32)
    kept = port.take_exactly(port.backlog)
    assert kept == went_in[-32:]


def test_a_large_piece_comes_out_without_a_copy() -> None:
    port = ConsolePort(1, "data")
    port.host_open = True
    piece = bytes(32768)
    port.append(piece)
    port.append(piece)
    port.append(piece)
    assert port.take(40000) is piece
    assert len(port.take(65536)) == 65536


def test_a_guest_that_writes_two_bytes_at_a_time_costs_little_more_memory_than_its_bytes() -> None:
    port = ConsolePort(1, "data")
    port.host_open = True
    tracemalloc.start()
    try:
        while port.room > 0:
            port.append(port.backlog.to_bytes(4, "little")[:2])
        assert tracemalloc.get_traced_memory()[0] < 2 * BACKLOG_BYTES
    finally:
        tracemalloc.stop()
    assert port.take_exactly(4) == b"\0\0\2\0"
