"""Markers: the lines of the guest contract, parsed strictly. A marker is the whole line, in ASCII, nothing around it.

BOOT_TIME:<stage>:<ns>             READY                    workload-pre-exec
heartbeat counter=<n>              listener proto=<p> port=<n>      workload-exit code=<n>
go-done tsc=<n> realtime_ns=<n>    idle
clock tsc=<n> ns=<n> tsc_end=<n>

``clock`` ties the guest's CLOCK_MONOTONIC to its time stamp counter: it read ``ns`` between the two counter values.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import attrs

STAGES = ("init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop")
"""The stages of BOOT_TIME, in boot order."""

U64_MAX = (1 << 64) - 1

_EXCERPT = 128


@attrs.frozen
class BootTime:
    """PID 1 reached ``stage`` at ``guest_ns`` of its CLOCK_MONOTONIC."""

    stage: str
    guest_ns: int


@attrs.frozen
class Ready:
    """The guest is ready."""


@attrs.frozen
class PreExec:
    """The workload is forked, one step before its exec."""


@attrs.frozen
class Heartbeat:
    """A sign of life; ``counter`` grows from 1."""

    counter: int


@attrs.frozen
class Listener:
    """Something in the guest listens on ``port``."""

    proto: str
    port: int


@attrs.frozen
class WorkloadExit:
    """The workload ended with exit status ``code``."""

    code: int


@attrs.frozen
class Idle:
    """PID 1 is alone: the workload and all that it left behind have ended, or there never was one."""


@attrs.frozen
class GoDone:
    """PID 1 has followed ``go``: its CLOCK_REALTIME was ``realtime_ns`` at the value ``tsc`` of its counter."""

    tsc: int
    realtime_ns: int


@attrs.frozen
class ClockReading:
    """PID 1 read ``ns`` of its CLOCK_MONOTONIC while its time stamp counter went from ``tsc`` to ``tsc_end``."""

    tsc: int
    ns: int
    tsc_end: int


@attrs.frozen
class Panic:
    """The guest's kernel panicked; ``detail`` is its reason."""

    detail: str


@attrs.frozen
class InitError:
    """PID 1 cannot make the guest ready; ``detail`` says what failed, as ``root=2`` with the errno."""

    detail: str


@attrs.frozen
class InitWarning:
    """PID 1 goes on without something; ``detail`` says what, as ``net=dhcp``."""

    detail: str


@attrs.frozen
class UnknownStage:
    """A well-formed BOOT_TIME whose stage is not in the contract."""


@attrs.frozen
class Malformed:
    """A line that begins like a marker and is none; ``excerpt`` is its beginning."""

    excerpt: bytes


_Heard = BootTime | Ready | PreExec | Heartbeat | Listener | WorkloadExit | Idle | GoDone
_Told = _Heard | ClockReading | InitError | InitWarning
Marker = _Told | Panic
Parsed = _Told | UnknownStage | Malformed

_Build = Callable[..., "Parsed | None"]


def parse_marker(line: bytes) -> Parsed | None:
    """The marker that ``line`` (without its newline) is; None for any other line."""
    fixed = _FIXED.get(line)
    if fixed is not None:
        return fixed
    for prefix, pattern, build in _NUMBERED:
        if line.startswith(prefix):
            match = pattern.fullmatch(line)
            marker = build(*match.groups()) if match else None
            return marker or Malformed(line[:_EXCERPT])
    return None


def parse_panic(line: bytes) -> Panic | None:
    """The panic that ``line`` of the console announces, with or without printk's time before it."""
    match = _PANIC.search(line)
    return Panic(match[1][:_EXCERPT].decode("ascii", "replace")) if match else None


def _number(digits: bytes, highest: int) -> int | None:
    # The pattern allows 20 digits at most, which u64 needs and int() takes quickly.
    value = int(digits)
    return value if value <= highest else None


def _boot_time(stage: bytes, digits: bytes) -> Parsed | None:
    guest_ns = _number(digits, U64_MAX)
    if guest_ns is None:
        return None
    name = stage.decode("ascii", "replace")
    return BootTime(name, guest_ns) if name in STAGES else UnknownStage()


def _heartbeat(digits: bytes) -> Parsed | None:
    counter = _number(digits, U64_MAX)
    return None if counter is None else Heartbeat(counter)


def _listener(proto: bytes, digits: bytes) -> Parsed | None:
    port = _number(digits, 0xFFFF)
    return Listener(proto.decode("ascii"), port) if port else None


def _workload_exit(digits: bytes) -> Parsed | None:
    code = _number(digits, 0xFF)
    return None if code is None else WorkloadExit(code)


def _clock(*digits: bytes) -> Parsed | None:
    values = [value for value in (_number(text, U64_MAX) for text in digits) if value is not None]
    if len(values) < len(digits) or values[2] < values[0]:
        return None
    return ClockReading(*values)


def _go_done(*digits: bytes) -> Parsed | None:
    tsc, realtime_ns = (_number(text, U64_MAX) for text in digits)
    return None if tsc is None or realtime_ns is None else GoDone(tsc, realtime_ns)


def _init_error(detail: bytes) -> Parsed:
    return InitError(detail.decode("ascii"))


def _init_warning(detail: bytes) -> Parsed:
    return InitWarning(detail.decode("ascii"))


_FIXED: dict[bytes, Parsed] = {b"READY": Ready(), b"workload-pre-exec": PreExec(), b"idle": Idle()}

_NUMBERED: tuple[tuple[bytes, re.Pattern[bytes], _Build], ...] = (
    (b"BOOT_TIME", re.compile(rb"BOOT_TIME:([^:]+):([0-9]{1,20})"), _boot_time),
    (b"heartbeat ", re.compile(rb"heartbeat counter=([0-9]{1,20})"), _heartbeat),
    (b"listener ", re.compile(rb"listener proto=(tcp6?|udp6?) port=([0-9]{1,5})"), _listener),
    (b"workload-exit ", re.compile(rb"workload-exit code=([0-9]{1,3})"), _workload_exit),
    (b"clock ", re.compile(rb"clock tsc=([0-9]{1,20}) ns=([0-9]{1,20}) tsc_end=([0-9]{1,20})"), _clock),
    (b"go-done ", re.compile(rb"go-done tsc=([0-9]{1,20}) realtime_ns=([0-9]{1,20})"), _go_done),
    (b"init-error ", re.compile(rb"init-error ([a-z]+=[!-~]{1,64})"), _init_error),
    (b"init-warning ", re.compile(rb"init-warning ([a-z]+=[!-~]{1,64})"), _init_warning),
)

_PANIC = re.compile(rb"(?:^|\] )Kernel panic - not syncing: (.*)")
