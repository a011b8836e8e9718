"""The guest's TSC on the host's clock, with a guest that says what its TSC is."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

import pytest

from asyncvmm.effects import SerialOutput
from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.guest_tsc import offset_by_attribute, offset_by_msr
from asyncvmm.machine.kvm.system import KvmSystem

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Make, Run

READINGS, BYTES = 5, 9

pytestmark = pytest.mark.anyio


def readings(run: Run) -> list[tuple[int, int]]:
    """What the guest said, each with the time its newline was written."""
    values = struct.unpack("<" + "Qx" * READINGS, run.output)
    times = [t for effect in run.effects if isinstance(effect, SerialOutput) for t in effect.newlines]
    # A newline's byte may stand in a counter's value, too.
    ends = [index for index, byte in enumerate(run.output) if byte == 10]
    return [(value, times[ends.index(index * BYTES + BYTES - 1)]) for index, value in enumerate(values)]


async def test_each_value_is_placed_between_the_start_and_the_end_of_its_line(boot: Boot) -> None:
    before_ns = time.monotonic_ns()
    async with boot("tsc") as run:
        await run.end()
        said = readings(run)
        instants = [run.machine.guest_instant(tsc) for tsc, _ in said]
    lower_ns = before_ns
    for instant, (_, arrived_ns) in zip(instants, said, strict=True):
        assert instant is not None
        at_ns, error_ns = instant
        assert lower_ns <= at_ns + error_ns
        assert at_ns - error_ns <= arrived_ns
        lower_ns = arrived_ns


async def test_a_value_the_guest_never_had_has_no_place(boot: Boot) -> None:
    async with boot("tsc") as run:
        await run.end()
        (last, _) = readings(run)[-1]
        assert run.machine.guest_instant(last) is not None
        for tsc in (0, last + (1 << 40), (1 << 64) - 1, last - (1 << 62)):
            assert run.machine.guest_instant(tsc) is None


async def test_the_guest_s_time_is_the_host_s_at_the_same_instant(boot: Boot) -> None:
    async with boot("spin") as run:
        before = time.monotonic_ns(), time.time_ns()
        now = run.machine.guest_time()
        after = time.monotonic_ns(), time.time_ns()
        assert now is not None
        instant = run.machine.guest_instant(now.tsc)
    assert instant is not None
    at_ns, error_ns = instant
    assert before[0] - error_ns <= at_ns <= after[0] + error_ns
    assert before[1] - error_ns <= now.realtime_ns <= after[1] + error_ns
    assert now.khz > 0


async def test_a_machine_that_was_not_started_places_nothing(make: Make) -> None:
    assert make("tsc").machine.guest_instant(1) is None
    assert make("tsc").machine.guest_time() is None


async def test_both_ways_to_learn_the_offset_agree() -> None:
    fds = [KvmSystem.open().fd]
    try:
        fds.append(ioctl(fds[0], Request.KVM_CREATE_VM))
        for index in range(2):
            fds.append(ioctl(fds[1], Request.KVM_CREATE_VCPU, index))
            exact, measured = offset_by_attribute(fds[-1]), offset_by_msr(fds[-1])
            assert exact is not None
            assert measured is not None
            assert measured.low <= exact.low <= measured.high
    finally:
        for fd in reversed(fds):
            os.close(fd)


async def test_samples_of_the_clock_ascend_and_enclose_it() -> None:
    before_ns = time.monotonic_ns()
    first, second = clock_sample(), clock_sample()
    assert first is not None
    assert second is not None
    assert before_ns <= first.ns <= second.ns <= time.monotonic_ns()
    assert first.tsc <= first.tsc_end <= second.tsc
