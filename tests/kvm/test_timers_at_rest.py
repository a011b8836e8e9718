"""Timers that expire while a guest is held, of which KVM knows and no register may tell: no restore loses a tick."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.machine.kvm.abi import KvmMsrEntry, KvmMsrs, Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.vcpu import read_vcpu
from tests.support.held_vm import HeldVm

pytestmark = pytest.mark.requires("kvm")

COUNT_S, CYCLES = 0.3, 600_000_000
"""As in expire.S; the PIT's is shorter."""
TIMERS = ["expire-one-shot", "expire-periodic", "expire-deadline", "expire-pit"]
TSC_DEADLINE = 0x6E0

Guest = Callable[[str], Path]


def armed(kernel: Path) -> HeldVm:
    """A guest that has armed its timer, held, with the byte that it waits for."""
    vm = HeldVm.boot(kernel)
    vm.run()
    vm.until(lambda: vm.output == b"!")
    vm.hold()
    assert vm.board.console.feed(b"x") == 1
    return vm


@pytest.fixture(params=TIMERS)
def expired(request: pytest.FixtureRequest, guest: Guest) -> Iterator[HeldVm]:
    """One whose timer has expired since."""
    vm = armed(guest(request.param))
    time.sleep(1.1 * max(COUNT_S, CYCLES / (vm.vm.tsc_khz * 1000)))
    yield vm
    vm.close()


def ticks(vm: HeldVm) -> int:
    """How many it has had, as it says."""
    vm.run()
    vm.until(lambda: vm.output.strip(b"!"))
    return int(vm.output.strip(b"!"))


def ticks_restored(vm: HeldVm, *, from_shell: bool = False) -> int:
    """How many another one has that goes on from there."""
    saved = vm.save()
    restored = HeldVm.restore(saved, from_shell=from_shell)
    try:
        return ticks(restored)
    finally:
        restored.close()
        saved.close()


@pytest.mark.parametrize("from_shell", [False, True])
def test_a_tick_that_came_while_the_guest_was_held_reaches_the_restored_one(expired: HeldVm, from_shell: bool) -> None:
    assert ticks_restored(expired, from_shell=from_shell) >= 1
    assert ticks(expired) >= 1


def test_a_deadline_that_is_gone_without_a_trace_is_taken_for_expired(guest: Guest) -> None:
    """KVM disarms it when it takes note of its expiry; here, as if no request had come of that."""
    vm = armed(guest("expire-deadline"))
    try:
        batch = KvmMsrs(nmsrs=1)
        batch.entries[0] = KvmMsrEntry(TSC_DEADLINE, 0, 0)
        assert ioctl(vm.vm.vcpus[0].fd, Request.KVM_SET_MSRS, batch) == 1
        assert read_vcpu(vm.vm.vcpus[0].fd, host_state()).tsc_deadline
        assert ticks_restored(vm) == 1
        assert ticks(vm) == 0
    finally:
        vm.close()
