from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.devices.rtc import DATA, INDEX, NVRAM_SIZE, Rtc, RtcState, decode, encode
from asyncvmm.errors import ConfigError

SATURDAY = datetime(2026, 11, 21, 15, 4, 59, tzinfo=UTC)
BCD, BINARY, TWELVE, TWENTY_FOUR, SET = 0x00, 0x04, 0x00, 0x02, 0x80
CLOCK = (0, 2, 4, 6, 7, 8, 9)
MODES = st.sampled_from([BCD | TWELVE, BCD | TWENTY_FOUR, BINARY | TWELVE, BINARY | TWENTY_FOUR])
THIS_CENTURY = st.datetimes(datetime(2000, 1, 1), datetime(2099, 12, 31), timezones=st.just(UTC)).map(
    lambda time: time.replace(microsecond=0)
)


class Host:
    """A host clock that tests move, and one RTC on it."""

    def __init__(self, time: datetime = SATURDAY) -> None:
        self.time = time
        self.rtc = Rtc(self.now)

    def now(self) -> float:
        return self.time.timestamp() + 0.25

    def get(self, register: int) -> int:
        self.rtc.write(INDEX, register)
        return self.rtc.read(DATA)

    def put(self, register: int, value: int) -> None:
        self.rtc.write(INDEX, register)
        self.rtc.write(DATA, value)

    def clock(self) -> list[int]:
        return [self.get(register) for register in CLOCK]


@pytest.fixture
def host() -> Host:
    return Host()


def test_it_starts_in_bcd_and_24_hours_as_a_pc_does(host: Host) -> None:
    assert host.clock() == [0x59, 0x04, 0x15, 7, 0x21, 0x11, 0x26]


def test_register_b_chooses_binary_and_12_hours(host: Host) -> None:
    host.put(0x0B, BINARY | TWELVE)
    assert host.clock() == [59, 4, 3 | 0x80, 7, 21, 11, 26]
    host.put(0x0B, BCD | TWELVE)
    assert host.get(4) == 0x83


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_12_hours_mark_the_afternoon(hour: int, shown: int) -> None:
    assert encode(SATURDAY.replace(hour=hour), BCD | TWELVE)[2] == shown


def test_the_clock_runs_with_the_hosts(host: Host) -> None:
    host.time += timedelta(seconds=1)
    assert host.clock()[:3] == [0x00, 0x05, 0x15]


def test_the_nmi_mask_is_not_part_of_the_index(host: Host) -> None:
    assert host.get(0x80 | 0x0D) == host.get(0x0D) == 0x80
    assert host.rtc.read(INDEX) == 0xFF


def test_no_update_is_ever_in_progress(host: Host) -> None:
    assert host.get(0x0A) == 0x26
    host.put(0x0A, 0xFF)
    assert host.get(0x0A) == 0x7F


def test_registers_c_and_d_ignore_writes(host: Host) -> None:
    host.put(0x0C, 0xFF)
    host.put(0x0D, 0x00)
    assert (host.get(0x0C), host.get(0x0D)) == (0x00, 0x80)


def test_alarms_and_nvram_hold_what_is_written(host: Host) -> None:
    held = {register: register ^ 0xA5 for register in (1, 3, 5, *range(14, 128))}
    for register, value in held.items():
        host.put(register, value)
    assert {register: host.get(register) for register in held} == held


def test_a_guest_sets_the_clock_as_linux_does(host: Host) -> None:
    host.put(0x0B, SET | TWENTY_FOUR)
    for register, value in zip(CLOCK, (0x30, 0x59, 0x23, 1, 0x31, 0x12, 0x30), strict=True):
        host.put(register, value)
    host.time += timedelta(minutes=5)
    assert host.clock() == [0x30, 0x59, 0x23, 1, 0x31, 0x12, 0x30], "SET stops the clock"
    host.put(0x0B, TWENTY_FOUR)
    host.time += timedelta(seconds=30)
    assert host.clock() == [0x00, 0x00, 0x00, 4, 0x01, 0x01, 0x31]


def test_a_register_may_be_set_while_the_clock_runs(host: Host) -> None:
    host.put(4, 0x07)
    assert host.clock() == [0x59, 0x04, 0x07, 7, 0x21, 0x11, 0x26]


@pytest.mark.parametrize(("register", "value"), [(8, 0x13), (7, 0x31), (0, 0x60), (4, 0x24), (9, 0xAA), (2, 0xFF)])
def test_a_time_that_does_not_exist_leaves_the_clock_alone(host: Host, register: int, value: int) -> None:
    before = host.clock()
    host.put(register, value)
    assert host.clock() == before


@given(THIS_CENTURY, MODES)
def test_every_time_of_the_century_survives_encoding(time: datetime, mode: int) -> None:
    assert decode(encode(time, mode), mode) == time


@given(st.binary(min_size=7, max_size=7), MODES)
def test_what_decodes_is_a_time_that_encodes_to_the_same_registers(registers: bytes, mode: int) -> None:
    time = decode(registers, mode)
    if time is not None:
        again = encode(time, mode)
        assert again[:3] + again[4:] == registers[:3] + registers[4:]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.none() | st.integers(0, 13) | st.integers(0, 255)), max_size=40),
    st.integers(0, 40),
    st.integers(0, 4_000_000_000),
)
def test_no_access_raises_and_a_restored_clock_answers_alike(
    accesses: list[tuple[int, int | None]], cut: int, seconds: int
) -> None:
    first = second = Rtc(lambda: seconds)
    for step, (offset, value) in enumerate(accesses):
        if step == cut:
            second = Rtc.from_state(first.state(), lambda: seconds)
        if value is None:
            assert 0 <= first.read(offset) <= 255
            assert first.read(offset) == second.read(offset)
        else:
            for clock in (first, second):
                clock.write(offset, value)
        assert first.state() == second.state()


def test_a_restored_clock_has_gone_on_running(host: Host) -> None:
    host.put(4, 0x07)
    state = host.rtc.state()
    host.time += timedelta(hours=2)
    host.rtc = Rtc.from_state(state, host.now)
    assert host.get(4) == 0x09


@pytest.mark.parametrize(
    "wrong",
    [
        {"index": 128},
        {"reg_a": 0x80},
        {"reg_b": 256},
        {"alarms": b""},
        {"nvram": bytes(NVRAM_SIZE + 1)},
        {"shift_s": 1 << 40},
        {"held": bytes(7)},
        {"reg_b": 0x82},
        {"reg_b": 0x82, "held": b"short"},
        {"reg_b": 0x82, "held": "1234567"},
    ],
)
def test_a_state_no_clock_can_have_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RtcState(**wrong)  # type: ignore[arg-type]
