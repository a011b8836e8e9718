"""Guests that would notice it are saved at random moments, and each time another VM goes on where they stood.

``tally`` counts in registers, memory, FPU and vector registers and prints; ``pulse`` has interrupts, timers and
received bytes under way all the time, and stops for good if it loses one. Moments in a normal run: 25, in the lab 5.
For more, set ASYNCVMM_MOMENTS; 1,000 take about a minute for each guest.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from asyncvmm.machine.kvm.fastpath.chain import executor, interpret
from asyncvmm.machine.kvm.restoring import Shell
from asyncvmm.timing.timeline import Timeline
from tests.kvm.conftest import IN_LAB
from tests.support.held_vm import HeldVm, Saved

pytestmark = pytest.mark.requires("kvm")

MOMENTS = int(os.environ.get("ASYNCVMM_MOMENTS", "5" if IN_LAB else "25"))
LETTERS = bytes(range(0x30, 0x70))
MOST_RUN_S = 0.004
AHEAD = 3

Guest = Callable[[str], Path]


class Tally:
    """What tally.S is to print."""

    vcpus = 1

    def prepare(self, vm: HeldVm) -> None:
        """It needs nothing."""

    def feed(self, vm: HeldVm) -> None:
        """Nor does it wait for anything."""

    def check(self, vm: HeldVm) -> None:
        """Not a letter too few, too many, or in another place."""
        output = bytes(vm.output)
        assert output == (LETTERS * (len(output) // len(LETTERS) + 1))[: len(output)]


class Pulse:
    """What pulse.S is to echo: the bytes that it has been fed, which are in flight when it is saved."""

    vcpus = 2

    def __init__(self) -> None:
        self.fed = 0

    def prepare(self, vm: HeldVm) -> None:
        """Wait until it takes bytes."""
        vm.run()
        vm.until(lambda: vm.output == b"!")

    def feed(self, vm: HeldVm) -> None:
        """Keep some ahead of it."""
        while self.fed < len(vm.output) - 1 + AHEAD:
            assert vm.board.console.feed(bytes([self.fed % 256])) == 1
            self.fed += 1

    def check(self, vm: HeldVm) -> None:
        """Everything once, in order."""
        assert bytes(vm.output[1:]) == bytes(number % 256 for number in range(len(vm.output) - 1))


GUESTS: dict[str, type[Tally | Pulse]] = {
    "tally": Tally,
    "tally-avx": Tally,  # which shows that all of XSAVE is kept
    "pulse-one-shot": Pulse,
    "pulse-periodic": Pulse,
    "pulse-deadline": Pulse,
}


def goes_on(vm: HeldVm, rules: Tally | Pulse) -> None:
    """It prints what comes next."""
    vm.run()
    goal = len(vm.take()) + 2
    rules.feed(vm)
    vm.until(lambda: len(vm.output) >= goal)
    rules.check(vm)


def go_to_a_moment(vm: HeldVm, rules: Tally | Pulse, chance: random.Random) -> Saved:
    """Let it run, hold it somewhere, and save it, sometimes with output that nobody has taken."""
    vm.run()
    time.sleep(chance.uniform(0, MOST_RUN_S))
    if chance.random() < 0.5:
        vm.take()
    rules.feed(vm)
    time.sleep(chance.uniform(0, MOST_RUN_S / 4))
    vm.hold()
    assert not vm.ends, vm.ends
    return vm.save()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.requires("xsave") if "avx" in name else ()) for name in GUESTS]
)
def test_whatever_the_moment_nothing_is_lost_and_nothing_comes_twice(name: str, guest: Guest) -> None:
    chance, rules = random.Random(5), GUESTS[name]()
    vm = HeldVm.boot(guest(name), vcpus=rules.vcpus)
    try:
        rules.prepare(vm)
        for _ in range(MOMENTS):
            saved = go_to_a_moment(vm, rules, chance)
            restored = HeldVm.restore(saved, from_shell=chance.random() < 0.5, native=chance.random() < 0.8)
            saved.close()
            restored.output[:] = vm.output
            vm.close()
            vm = restored
            rules.check(vm)
        goes_on(vm, rules)
    finally:
        vm.close()


@pytest.mark.parametrize("name", ["tally", "pulse-deadline"])
def test_the_one_that_was_saved_goes_on_as_if_nothing_had_been(name: str, guest: Guest) -> None:
    chance, rules = random.Random(6), GUESTS[name]()
    vm = HeldVm.boot(guest(name), vcpus=rules.vcpus)
    try:
        rules.prepare(vm)
        for _ in range(10):
            go_to_a_moment(vm, rules, chance).close()
            goes_on(vm, rules)
    finally:
        vm.close()


def test_clones_of_one_snapshot_go_on_from_the_same_moment_apart_from_each_other(guest: Guest) -> None:
    vm = HeldVm.boot(guest("tally"))
    clones: list[HeldVm] = []
    try:
        vm.run()
        vm.until(lambda: len(vm.output) > 10)
        vm.hold()
        vm.take()
        saved = vm.save()
        for count in range(4):
            clone = HeldVm.restore(saved)
            clones.append(clone)
            clone.output[:] = vm.output
            if count % 2:
                goes_on(clone, Tally())
        for clone in reversed(clones):
            goes_on(clone, Tally())
        saved.close()
    finally:
        for each in (vm, *clones):
            each.close()


@pytest.fixture
def saved(guest: Guest) -> Iterator[Saved]:
    """The tally, held after some letters, none of which was taken."""
    vm = HeldVm.boot(guest("tally"))
    try:
        vm.run()
        while vm.board.console.transmitted() < 5:
            time.sleep(0.001)
        vm.hold()
        saved = vm.save()
    finally:
        vm.close()
    yield saved
    saved.close()


def test_output_that_nobody_had_taken_comes_out_of_the_restored_guest(saved: Saved) -> None:
    vm = HeldVm.restore(saved)
    try:
        assert len(vm.take()) >= 5
        Tally().check(vm)
    finally:
        vm.close()


def test_a_chain_without_the_library_makes_the_same_vm(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    executor.cache_clear()
    monkeypatch.setattr("asyncvmm.machine.kvm.fastpath.chain.native", lambda: None)
    assert executor() is interpret
    vm = HeldVm.restore(saved)
    try:
        goes_on(vm, Tally())
    finally:
        vm.close()
        monkeypatch.undo()
        executor.cache_clear()


def test_the_phases_of_a_restore_have_their_names(saved: Saved) -> None:
    timeline, shell_timeline, fill_timeline = Timeline(), Timeline(), Timeline()
    blueprint = saved.blueprint()
    blueprint.run(timeline).close()
    blueprint.fill(Shell(blueprint.shape.shell, shell_timeline), fill_timeline).close()
    made = ["kvm_open", "kvm_create_vm", "vm_arch_setup", "memory_alloc", "memory_register", "irqchip_create"]
    state = ["memory_state_write", "cpuid_config", "vcpu_state_restore", "device_state_restore"]
    assert sorted(timeline.durations()) == sorted([*made, "vcpu_create", *state])
    assert sorted(shell_timeline.durations()) == sorted([*made, "vcpu_create"])
    assert sorted(fill_timeline.durations()) == sorted(state)


def test_a_shell_is_filled_once_and_only_with_what_fits(saved: Saved) -> None:
    blueprint = saved.blueprint()
    shell = Shell(blueprint.shape.shell, Timeline())
    blueprint.fill(shell, Timeline()).close()
    with pytest.raises(ValueError, match="filled or closed"):
        blueprint.fill(shell, Timeline())
    other = Shell(attrs.evolve(blueprint.shape.shell, vcpus=2), Timeline())
    with pytest.raises(ValueError, match="a shell of"):
        blueprint.fill(other, Timeline())
    other.close()
    other.close()
