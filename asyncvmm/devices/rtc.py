"""An MC146818 real-time clock: the date and time, alarm registers that hold what is written, and 114 bytes of NVRAM.

Facts: the Motorola MC146818 datasheet (registers 0..9 and A..D, BCD or binary, 12 or 24 hours, SET), behind the PC's
index port 0x70, whose bit 7 is the NMI mask, and data port 0x71. Where this clock has a choice:

- An update takes no time: UIP never shows, so nobody polls for it. It raises no interrupts: register C reads 0.
- It keeps the difference to the host's clock. A guest that sets it changes that difference, not the host.
- Two digits of a year written are of 2000 to 2099. The day of the week follows from the date.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

import attrs

from asyncvmm.devices.checks import BYTE, exactly_bytes, within
from asyncvmm.errors import ConfigError

INDEX: Final = 0
DATA: Final = 1
PORT_COUNT: Final = 2

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REG_A, REG_B, REG_C, REG_D = range(10, 14)
NVRAM_FIRST: Final = 14
NVRAM_SIZE: Final = 114

REG_A_UIP: Final = 0x80
REG_A_DEFAULT: Final = 0x26
"""The 32.768 kHz time base, and a periodic rate of 1024 Hz."""
REG_B_24H: Final = 0x02
REG_B_BINARY: Final = 0x04
REG_B_SET: Final = 0x80
REG_D_VALID_RAM_AND_TIME: Final = 0x80
HOURS_PM: Final = 0x80

MAX_SHIFT_S: Final = 1 << 33
"""Most seconds (272 years) the clock may differ from the host's."""

_INDEX_MASK: Final = 0x7F
_ALARMS: Final = (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)
_CLOCK: Final = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def encode(time: datetime, mode: int) -> bytes:
    """The seven clock registers, in the order of their numbers, as register B's ``mode`` bits want them."""
    hours, afternoon = time.hour, 0
    if not mode & REG_B_24H:
        afternoon = HOURS_PM if hours >= 12 else 0
        hours = hours % 12 or 12
    values = (time.second, time.minute, hours, time.isoweekday() % 7 + 1, time.day, time.month, time.year % 100)
    registers = bytearray(values if mode & REG_B_BINARY else (value // 10 << 4 | value % 10 for value in values))
    registers[2] |= afternoon
    return bytes(registers)


def decode(registers: bytes, mode: int) -> datetime | None:
    """The time that the seven clock registers show; None if they show none."""
    afternoon = not mode & REG_B_24H and registers[2] & HOURS_PM
    plain = [*registers[:2], registers[2] & ~HOURS_PM if afternoon else registers[2], *registers[3:]]
    if not mode & REG_B_BINARY:
        if any(value & 0x0F > 9 or value >> 4 > 9 for value in plain):
            return None
        plain = [(value >> 4) * 10 + (value & 0x0F) for value in plain]
    second, minute, hour, _, day, month, year = plain
    if not mode & REG_B_24H:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if afternoon else 0)
    try:
        return datetime(2000 + year, month, day, hour, minute, second, tzinfo=UTC) if year <= 99 else None
    except ValueError:
        return None


def _check_held(_: object, __: object, value: bytes | None) -> None:
    if value is not None and (not isinstance(value, bytes) or len(value) != len(_CLOCK)):
        raise ConfigError("saved held", expected=f"None or {len(_CLOCK)} bytes", found=repr(value)[:40])


@attrs.frozen(kw_only=True)
class RtcState:
    """All that the clock remembers. ``shift_s`` is its seconds ahead of the host's clock; ``held`` the seven clock
    registers while SET stops them, else None. Construction refuses what no clock can hold (ConfigError)."""

    index: int = attrs.field(default=0, validator=within(0, _INDEX_MASK))
    reg_a: int = attrs.field(default=REG_A_DEFAULT, validator=within(0, 0x7F))
    reg_b: int = attrs.field(default=REG_B_24H, validator=BYTE)
    alarms: bytes = attrs.field(default=bytes(3), validator=exactly_bytes(3))
    nvram: bytes = attrs.field(default=bytes(NVRAM_SIZE), validator=exactly_bytes(NVRAM_SIZE))
    shift_s: int = attrs.field(default=0, validator=within(-MAX_SHIFT_S, MAX_SHIFT_S))
    held: bytes | None = attrs.field(default=None, validator=_check_held)

    def __attrs_post_init__(self) -> None:
        if (self.held is not None) != bool(self.reg_b & REG_B_SET):
            raise ConfigError("saved held", expected="registers if and only if SET", found=f"B = {self.reg_b:#x}")


class Rtc:
    """One clock at an index and a data port. ``now`` gives the host's UTC as seconds since 1970."""

    __slots__ = ("_alarms", "_held", "_index", "_now", "_nvram", "_reg_a", "_reg_b", "_shift_s")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._load(RtcState())

    @classmethod
    def from_state(cls, state: RtcState, now: Callable[[], float]) -> Rtc:
        """The clock that ``state()`` described; it has gone on running meanwhile."""
        clock = cls(now)
        clock._load(state)
        return clock

    def _load(self, state: RtcState) -> None:
        self._index, self._reg_a, self._reg_b = state.index, state.reg_a, state.reg_b
        self._alarms, self._nvram = bytearray(state.alarms), bytearray(state.nvram)
        self._shift_s = state.shift_s
        self._held = None if state.held is None else bytearray(state.held)

    def state(self) -> RtcState:
        """All that this clock remembers."""
        return RtcState(
            index=self._index,
            reg_a=self._reg_a,
            reg_b=self._reg_b,
            alarms=bytes(self._alarms),
            nvram=bytes(self._nvram),
            shift_s=self._shift_s,
            held=None if self._held is None else bytes(self._held),
        )

    def read(self, offset: int) -> int:
        """The data port's register; the index port cannot be read."""
        if offset != DATA:
            return 0xFF
        index = self._index
        if index >= NVRAM_FIRST:
            return self._nvram[index - NVRAM_FIRST]
        if index in _ALARMS:
            return self._alarms[_ALARMS.index(index)]
        if index in _CLOCK:
            return self._clock_registers()[_CLOCK.index(index)]
        return {REG_A: self._reg_a, REG_B: self._reg_b, REG_D: REG_D_VALID_RAM_AND_TIME}.get(index, 0)

    def write(self, offset: int, value: int) -> None:
        """Select a register, or write to the one selected. Registers C and D ignore it."""
        index = self._index
        if offset != DATA:
            self._index = value & _INDEX_MASK
        elif index >= NVRAM_FIRST:
            self._nvram[index - NVRAM_FIRST] = value
        elif index in _ALARMS:
            self._alarms[_ALARMS.index(index)] = value
        elif index in _CLOCK:
            self._write_clock(_CLOCK.index(index), value)
        elif index == REG_A:
            self._reg_a = value & ~REG_A_UIP
        elif index == REG_B:
            self._write_reg_b(value)

    def _clock_registers(self) -> bytes | bytearray:
        if self._held is not None:
            return self._held
        return encode(_EPOCH + timedelta(seconds=int(self._now()) + self._shift_s), self._reg_b)

    def _write_clock(self, position: int, value: int) -> None:
        registers = bytearray(self._clock_registers())
        registers[position] = value
        if self._held is not None:
            self._held = registers
        else:
            self._set(registers)

    def _write_reg_b(self, value: int) -> None:
        if value & REG_B_SET and self._held is None:
            self._held = bytearray(self._clock_registers())
        self._reg_b = value
        if not value & REG_B_SET and self._held is not None:
            held, self._held = self._held, None
            self._set(held)

    def _set(self, registers: bytearray) -> None:
        """Run on from the time shown. One that does not exist leaves the clock as it was."""
        time = decode(bytes(registers), self._reg_b)
        if time is not None:
            shift_s = int((time - _EPOCH).total_seconds()) - int(self._now())
            self._shift_s = max(-MAX_SHIFT_S, min(shift_s, MAX_SHIFT_S))
