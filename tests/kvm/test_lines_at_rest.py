"""An interrupt line that is high when its guest is saved: the restored one has the interrupt that it would have had,
and no other; and the IOAPIC is as the guest left it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncvmm.x86.layout import COM1_GSI
from tests.support.held_vm import HeldVm

pytestmark = pytest.mark.requires("kvm")

Guest = Callable[[str], Path]


def held_with_its_line_high(kernel: Path, said: bytes) -> HeldVm:
    """A guest that has a byte which it does not read, and has said so much."""
    vm = HeldVm.boot(kernel)
    vm.run()
    vm.until(lambda: vm.output == b"!")
    assert vm.board.console.feed(b"x") == 1
    vm.until(lambda: vm.output == said)
    vm.hold()
    return vm


def restored(vm: HeldVm, *, from_shell: bool) -> HeldVm:
    """Another one that goes on from there."""
    saved = vm.save()
    try:
        return HeldVm.restore(saved, from_shell=from_shell)
    finally:
        saved.close()


def told(vm: HeldVm) -> bytes:
    """What it says of its interrupts and its IOAPIC."""
    before = len(vm.take())
    assert vm.board.control.feed(b"c") == 1
    vm.run()
    vm.until(lambda: vm.output.endswith(b"."))
    return bytes(vm.output[before:])


def one_more(vm: HeldVm) -> bytes:
    """What it says of its interrupts when another byte has come."""
    before = len(vm.take())
    assert vm.board.console.feed(b"y") == 1
    vm.until(lambda: len(vm.output) > before)
    return bytes(vm.output[before:])


@pytest.mark.parametrize("from_shell", [False, True])
def test_an_edge_that_the_guest_has_had_does_not_come_again_but_the_next_one_does(
    guest: Guest, from_shell: bool
) -> None:
    vm = held_with_its_line_high(guest("lines"), b"!i")
    other = restored(vm, from_shell=from_shell)
    try:
        assert other.board.state().high == vm.board.state().high == [COM1_GSI]
        for each in (other, vm):
            assert told(each) == b"1vK."
            assert one_more(each) == b"2"
    finally:
        other.close()
        vm.close()


@pytest.mark.parametrize("from_shell", [False, True])
def test_a_level_that_was_masked_comes_through_once_it_is_not(guest: Guest, from_shell: bool) -> None:
    vm = held_with_its_line_high(guest("lines-masked"), b"!")
    other = restored(vm, from_shell=from_shell)
    try:
        assert told(other) == told(vm) == b"1vK."
    finally:
        other.close()
        vm.close()
