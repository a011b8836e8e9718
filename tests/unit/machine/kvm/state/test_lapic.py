from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.state.lapic import keep_deadline, keep_tick

ONE_SHOT, PERIODIC, DEADLINE = 0, 1 << 17, 2 << 17
MASKED = 1 << 16
LVT_TIMER, INITIAL_COUNT, IN_SERVICE, REQUESTS = 0x320, 0x380, 0x100, 0x200
NOW = 1 << 40


def lapic(timer: int, initial_count: int = 1000, requested: int | None = None, in_service: int | None = None) -> bytes:
    registers = bytearray(1024)
    registers[LVT_TIMER : LVT_TIMER + 4] = timer.to_bytes(4, "little")
    registers[INITIAL_COUNT : INITIAL_COUNT + 4] = initial_count.to_bytes(4, "little")
    for first, vector in ((REQUESTS, requested), (IN_SERVICE, in_service)):
        if vector is not None:
            registers[place(first, vector)] |= 1 << vector % 8
    return bytes(registers)


def place(first: int, vector: int) -> int:
    """Eight registers of 32 bits, 16 bytes apart (Intel SDM volume 3, figure 11-20)."""
    return first + vector // 32 * 16 + vector % 32 // 8


@given(st.integers(16, 255))
def test_a_periodic_timers_tick_is_requested_once_more(vector: int) -> None:
    assert keep_tick(lapic(PERIODIC | vector)) == lapic(PERIODIC | vector, requested=vector)


@pytest.mark.parametrize(
    ("timer", "count"),
    [(ONE_SHOT | 64, 5), (DEADLINE | 64, 5), (PERIODIC | MASKED | 64, 5), (PERIODIC | 64, 0), (PERIODIC | 15, 5)],
    ids=["one shot", "deadline", "masked", "stopped", "a vector that is none"],
)
def test_no_tick_comes_of_a_timer_that_has_none(timer: int, count: int) -> None:
    assert keep_tick(lapic(timer, count)) == lapic(timer, count)


def test_a_deadline_that_may_have_expired_unnoticed_is_armed_for_now() -> None:
    assert keep_deadline(lapic(DEADLINE | 64), 0, NOW) == NOW


@pytest.mark.parametrize("vector", [16, 64, 255])
def test_one_that_the_guest_is_told_of_stays_disarmed(vector: int) -> None:
    assert keep_deadline(lapic(DEADLINE | vector, requested=vector), 0, NOW) == 0
    assert keep_deadline(lapic(DEADLINE | vector, in_service=vector), 0, NOW) == 0


@pytest.mark.parametrize("timer", [ONE_SHOT | 64, PERIODIC | 64, DEADLINE | MASKED | 64])
def test_a_timer_in_another_mode_has_no_deadline(timer: int) -> None:
    assert keep_deadline(lapic(timer), 0, NOW) == 0


def test_a_deadline_to_come_stays() -> None:
    assert keep_deadline(lapic(DEADLINE | 64), NOW + 5, NOW) == NOW + 5


@given(st.binary(min_size=1024, max_size=1024), st.integers(0, (1 << 64) - 1))
def test_any_registers_are_read(registers: bytes, deadline: int) -> None:
    kept = keep_tick(registers)
    assert len(kept) == 1024
    changed = [(one, other) for one, other in zip(registers, kept, strict=True) if one != other]
    assert len(changed) <= 1
    assert all((one | other) == other for one, other in changed)
    assert keep_deadline(registers, deadline, NOW) in (deadline, NOW)
