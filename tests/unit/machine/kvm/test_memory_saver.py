"""How a copy of memory is cut into pieces, after each of which one looks whether to go on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.memory_saver import _PIECE_BYTES, _pieces
from asyncvmm.machine.kvm.pages import total
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

LENGTHS = st.one_of(st.integers(1, 4), st.integers(1, 5000))


@st.composite
def apart(draw: st.DrawFn) -> list[Run]:
    runs: list[Run] = []
    at = 0
    for gap, length in draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=30)):
        runs.append(((at + gap) * PAGE_BYTES, length * PAGE_BYTES))
        at += gap + length
    return runs


@given(apart())
def test_pieces_are_the_runs_in_their_order(runs: list[Run]) -> None:
    joined: list[Run] = []
    for offset, size in (run for piece in _pieces(runs) for run in piece):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((offset, size))
    assert joined == runs


@given(apart())
def test_every_piece_but_the_last_is_full(runs: list[Run]) -> None:
    sizes = [total(piece) for piece in _pieces(runs)]
    assert all(size == _PIECE_BYTES for size in sizes[:-1])
    assert all(0 < size <= _PIECE_BYTES for size in sizes[-1:])


def test_single_pages_are_copied_many_at_a_time() -> None:
    runs = [(2 * number * PAGE_BYTES, PAGE_BYTES) for number in range(1000)]
    assert list(_pieces(runs)) == [runs]
