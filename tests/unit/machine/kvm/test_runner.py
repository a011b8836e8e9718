"""A runner that makes chains of harmless calls: what it tells whom, and when it is to be had again."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.fastpath.binding import load
from asyncvmm.machine.kvm.fastpath.chain import Chain
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.runner import Runner

GETPID = 39
NO_VCPU = -1
ROUNDS = 3000
PATIENCE_S = 10

if load() is None:
    pytest.skip("the native library cannot be loaded here", allow_module_level=True)


def taken() -> Runner:
    end = time.monotonic() + PATIENCE_S
    while (found := runner.take()) is None:
        runner.make_one()
        assert time.monotonic() < end
        time.sleep(0)
    return found


class Errand:
    """A chain of ``calls`` calls, whose vCPU is none, so that no guest is entered."""

    def __init__(self, calls: int) -> None:
        chain = Chain(given=1)
        for _ in range(calls):
            chain.call("getpid", GETPID)
        self.program = chain.program()
        self.pinned = Pinned(self.program.steps)
        self.over = threading.Event()

    def send(self, to: Runner) -> None:
        self.over.clear()
        names: Any = SimpleNamespace(
            address=self.pinned.address, count=len(self.program.names), first=self.program.first, vcpu=1, clock=0
        )
        to.send(names, self.program.lay_out(NO_VCPU), 1, self.over.set)


def test_who_is_told_that_the_bell_was_rung_before_does_not_hear_it() -> None:
    errand, bell = Errand(calls=3), os.eventfd(0, os.EFD_NONBLOCK)
    for round_ in range(ROUNDS):
        idle = taken()
        errand.send(idle)
        for _ in range(round_ % 50):  # so that both come at all moments of the other
            pass
        was_rung = idle.ring(bell)
        assert errand.over.wait(PATIENCE_S)
        if was_rung:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(bell)
        else:
            assert os.eventfd_read(bell) == 1
    os.close(bell)
