"""The local APIC's timer in a saved state: a tick that has come but not yet reached the guest must not be lost.

Facts: Intel SDM volume 3, 11.5.4 (APIC timer), the layout of its registers (table 11-1), and what KVM saves: an expired
timer counts as pending inside KVM until the vCPU is next entered, and that count is in no state KVM gives. A one-shot
timer whose current count is 0 expires once more when KVM_SET_LAPIC starts it again.
"""

from __future__ import annotations

from typing import Final

_LVT_TIMER: Final = 0x320
_INITIAL_COUNT: Final = 0x380
_IN_SERVICE: Final = 0x100
_REQUESTS: Final = 0x200
_MASKED: Final = 1 << 16
_MODE_SHIFT, _MODES, _PERIODIC, _DEADLINE = 17, 3, 1, 2
_LOWEST_VECTOR: Final = 16


def keep_tick(lapic: bytes) -> bytes:
    """KVM_GET_LAPIC's answer with a periodic timer's tick requested: the last one may not be in there yet.

    At worst the guest sees a tick too many.
    """
    vector = _vector(lapic, _PERIODIC)
    if vector is None or not _word(lapic, _INITIAL_COUNT):
        return lapic
    registers = bytearray(lapic)
    registers[_byte_of(_REQUESTS, vector)] |= 1 << vector % 8
    return bytes(registers)


def keep_deadline(lapic: bytes, deadline: int, tsc: int) -> int:
    """What IA32_TSC_DEADLINE is to be: a disarmed one that may have expired unnoticed is armed for ``tsc``, now."""
    vector = _vector(lapic, _DEADLINE)
    if deadline or vector is None:
        return deadline
    noticed = any(lapic[_byte_of(registers, vector)] >> vector % 8 & 1 for registers in (_REQUESTS, _IN_SERVICE))
    return 0 if noticed else tsc


def _vector(lapic: bytes, mode: int) -> int | None:
    """The timer's vector, if it is in that mode and not masked."""
    timer = _word(lapic, _LVT_TIMER)
    vector = timer & 0xFF
    if timer & _MASKED or timer >> _MODE_SHIFT & _MODES != mode or vector < _LOWEST_VECTOR:
        return None
    return vector


def _word(lapic: bytes, register: int) -> int:
    return int.from_bytes(lapic[register : register + 4], "little")


def _byte_of(registers: int, vector: int) -> int:
    """Where a vector's bit is among eight registers of 32 bits, each 16 bytes from the last."""
    return registers + (vector // 32) * 16 + vector % 32 // 8
