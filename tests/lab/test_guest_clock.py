"""The guest's clock on the host's axis by its TSC: a delay on either side is found where it was, on real KVM."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import anyio
import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.guest.image import find_image
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.plan import make_plan
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.timeline import Timeline
from tests.support.placed import Placed
from tests.support.slow_init import NAP_NS, slow_initrd

PATIENCE_S = 150
PAUSE_S = 0.5
STAGES = ["init_entry", "mounts_done", "uart_access_done", "init_ok", "ready", "command_loop"]


@attrs.frozen
class Boot:
    """A boot whose guest was kept from running between two t_ns while it said its first stages."""

    guest: Placed
    paused: tuple[int, int]
    unplaced: GuestClock


async def boot(initrd: Path, vcpus: int) -> Boot:
    """Boot with the slow PID 1; pause it as soon as it has said its first line."""
    timeline = Timeline()
    guest, unaided = Placed(timeline), Placed(timeline)
    config = VMConfig(accel="kvm", kernel=find_image().kernel, initrd=initrd, vcpus=vcpus)

    def take(effects: object) -> None:
        guest.take(effects)  # type: ignore[arg-type]
        unaided.take(effects)  # type: ignore[arg-type]

    machine = KvmMachine(make_plan(config, "clock", "kvm", None), timeline, take)
    guest.guest_instant = machine.guest_instant
    try:
        await machine.start()
        await guest.until(lambda: guest.watch.guest_clock, PATIENCE_S)
        begin = guest.now()
        await machine.pause()
        await anyio.sleep(PAUSE_S)
        end = guest.now()
        await machine.resume()
        await guest.until(lambda: guest.captured, PATIENCE_S)
    finally:
        await machine.stop()
    return Boot(guest, (begin, end), unaided.clock)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 vCPU", "2 vCPUs"])
def paused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """One such boot."""
    initrd = slow_initrd(find_image(), tmp_path_factory.mktemp("slow"))
    return anyio.run(boot, initrd, request.param)


def test_the_clock_is_tied_by_the_tsc_far_closer_than_lines_could(paused: Boot) -> None:
    clock = paused.guest.clock
    print(f"by TSC {clock}, without it {paused.unplaced}")
    assert clock.source == "tsc"
    assert paused.unplaced.source == "paired"
    assert abs(clock.offset_ns - paused.unplaced.offset_ns) <= clock.error_ns + paused.unplaced.error_ns
    assert clock.error_ns < paused.unplaced.error_ns / 10


def test_a_pause_by_the_host_is_found_where_it_was(paused: Boot) -> None:
    guest, (begin, end) = paused.guest, paused.paused
    error = guest.clock.error_ns
    assert guest.arrived("uart_access_done") >= end
    assert guest.at("uart_access_done") - error < begin
    assert guest.at("init_ok") + error > end + NAP_NS
    assert guest.line("nap begins") >= end


def test_a_nap_of_the_guest_is_found_between_the_stages_where_it_was(paused: Boot) -> None:
    guest, (begin, end) = paused.guest, paused.paused
    gaps = {after: guest.at(after) - guest.at(before) for before, after in pairwise(STAGES)}
    assert gaps.pop("init_ok") >= NAP_NS + end - begin
    assert all(gap < NAP_NS for gap in gaps.values()), gaps
    error = guest.clock.error_ns
    assert guest.at("init_ok") + error >= guest.line("nap begins")


def test_no_stage_is_placed_behind_the_arrival_of_its_line(paused: Boot) -> None:
    guest = paused.guest
    for stage in STAGES:
        assert guest.at(stage) - guest.clock.error_ns <= guest.arrived(stage)


@pytest.mark.anyio
async def test_a_vm_on_kvm_has_its_guests_clock_by_the_tsc() -> None:
    with anyio.fail_after(PATIENCE_S):
        async with VM(VMConfig(accel="kvm")) as vm:
            await vm.boot()
            assert vm.guest_clock is not None
            print(f"of a VM {vm.guest_clock}, exits {vm.exits.total if vm.exits else 0}")
            assert vm.guest_clock.source == "tsc"
