"""The guest's clock on the host's axis: a delay on either side is found where it was, with a real Linux."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VMConfig
from asyncvmm.accel import probe_kvm
from asyncvmm.effects import Effect
from asyncvmm.guest.image import find_image
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.plan import make_plan
from asyncvmm.timing.timeline import Timeline
from tests.support.placed import Placed
from tests.support.slow_init import NAP_NS, slow_initrd

pytestmark = pytest.mark.requires("qemu", "image")

PATIENCE_S = 120
LATE_S = 0.25
BLOCKED_S = 3 * NAP_NS / 1e9
STAGES = ["init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop"]


@attrs.define
class Boot:
    """One boot, seen promptly, seen by a host that reads all of it ``LATE_S`` later, and seen with the guest's TSC."""

    prompt: Placed
    late: Placed
    by_tsc: Placed
    blocked: tuple[int, int] = (0, 0)


async def boot(initrd: Path, *, block: bool) -> Boot:
    """Boot with the slow PID 1; ``block`` keeps the host from reading from its first stage to long after its nap."""
    timeline = Timeline()
    seen = Boot(Placed(timeline), Placed(timeline), Placed(timeline))
    config = VMConfig(accel="qemu", kernel=find_image().kernel, initrd=initrd)
    plan = make_plan(config, "clock", "qemu", probe_kvm().tsc_khz)

    def take(effects: Sequence[Effect]) -> None:
        seen.prompt.take(effects)
        seen.by_tsc.take(effects)
        asyncio.get_running_loop().call_later(LATE_S, seen.late.take_late, effects)
        if block and seen.blocked == (0, 0) and seen.prompt.watch.guest_clock is not None:
            begin = seen.prompt.now()
            time.sleep(BLOCKED_S)
            seen.blocked = begin, seen.prompt.now()

    machine = QemuMachine(plan, timeline, take)
    seen.by_tsc.guest_instant = machine.guest_instant
    try:
        await machine.start()
        await seen.prompt.until(lambda: seen.late.captured, PATIENCE_S)
    finally:
        await machine.stop()
    return seen


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default image's, with the slow PID 1."""
    return slow_initrd(find_image(), tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def read_promptly(initrd: Path) -> Boot:
    """A boot whose lines are read as they come."""
    return anyio.run(lambda: boot(initrd, block=False))


@pytest.fixture(scope="module")
def read_late(initrd: Path) -> Boot:
    """A boot whose host reads nothing for a while."""
    return anyio.run(lambda: boot(initrd, block=True))


def test_stages_are_placed_in_order_and_before_their_lines_arrive(read_promptly: Boot) -> None:
    guest = read_promptly.prompt
    assert guest.clock.source == "paired"
    places = [guest.at(stage) for stage in STAGES]
    assert places == sorted(places)
    for stage in STAGES:
        assert guest.at(stage) <= guest.arrived(stage)


def test_a_nap_of_the_guest_is_found_between_the_stages_where_it_was(read_promptly: Boot) -> None:
    guest = read_promptly.prompt
    gaps = {after: guest.at(after) - guest.at(before) for before, after in pairwise(STAGES)}
    assert gaps.pop("init_ok") >= NAP_NS
    assert all(gap < NAP_NS for gap in gaps.values()), gaps
    assert guest.at("uart_access_done") <= guest.line("nap begins")
    assert guest.at("init_ok") >= guest.line("nap begins") + NAP_NS - guest.clock.error_ns


def test_a_host_that_reads_late_places_stages_where_they_were(read_late: Boot) -> None:
    guest, (begin, end) = read_late.prompt, read_late.blocked
    for stage in ("init_ok", "ready", "command_loop"):
        assert guest.arrived(stage) >= end
        assert begin < guest.at(stage) < end
    assert NAP_NS <= guest.at("init_ok") - guest.at("uart_access_done") < end - begin


@pytest.mark.parametrize("which", ["read_promptly", "read_late"])
def test_what_delays_every_line_widens_the_bound_by_as_much(which: str, request: pytest.FixtureRequest) -> None:
    seen: Boot = request.getfixturevalue(which)
    shift = seen.late.clock.offset_ns - seen.prompt.clock.offset_ns
    assert shift > 0
    assert seen.late.clock.error_ns - seen.prompt.clock.error_ns == pytest.approx(shift, rel=0.01)
    assert shift <= seen.late.clock.error_ns


@pytest.mark.parametrize("which", ["read_promptly", "read_late"])
def test_the_tsc_ties_the_clock_far_closer_than_the_lines(which: str, request: pytest.FixtureRequest) -> None:
    seen: Boot = request.getfixturevalue(which)
    by_tsc, paired = seen.by_tsc.clock, seen.prompt.clock
    print(f"by TSC {by_tsc}, without it {paired}")
    assert by_tsc.source == "tsc"
    assert abs(by_tsc.offset_ns - paired.offset_ns) <= by_tsc.error_ns + paired.error_ns
    assert by_tsc.error_ns < paired.error_ns / 10


def test_by_the_tsc_no_stage_lies_behind_its_line_and_a_late_host_changes_nothing(read_late: Boot) -> None:
    guest, (begin, end) = read_late.by_tsc, read_late.blocked
    for stage in STAGES:
        assert guest.at(stage) - guest.clock.error_ns <= guest.arrived(stage)
    assert begin < guest.at("init_ok") < end
    assert guest.at("uart_access_done") - guest.clock.error_ns <= begin


def test_a_machine_that_was_stopped_in_between_does_not_tell(initrd: Path) -> None:
    async def pause_and_ask() -> tuple[object, object]:
        timeline = Timeline()
        guest = Placed(timeline)
        config = VMConfig(accel="qemu", kernel=find_image().kernel, initrd=initrd)
        machine = QemuMachine(make_plan(config, "clock", "qemu", probe_kvm().tsc_khz), timeline, guest.take)
        try:
            await machine.start()
            await guest.until(lambda: machine.guest_instant(1), PATIENCE_S)
            before = machine.guest_instant(1)
            await machine.pause()
            await machine.resume()
            return before, machine.guest_instant(1)
        finally:
            await machine.stop()

    before, after = anyio.run(pause_and_ask)
    assert before is not None
    assert after is None
