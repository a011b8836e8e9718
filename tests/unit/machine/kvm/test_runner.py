"""A runner that makes chains of harmless calls: what it tells whom, and when it is to be had again."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from ctypes import addressof

import pytest

from asyncvmm.machine.kvm import runner
from asyncvmm.machine.kvm.bell import Bell
from asyncvmm.machine.kvm.fastpath.binding import Library, Order
from asyncvmm.machine.kvm.fastpath.chain import Chain
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.runner import Runner

pytestmark = [pytest.mark.anyio, pytest.mark.requires("native-library")]

GETPID = 39
NO_VCPU = -1
UNDECIDED, OPEN = 0, 1
ROUNDS = 300
PATIENCE_S = 10


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
        self.slots = self.program.lay_out(NO_VCPU)
        self.over = threading.Event()
        self.order = Order()

    def send(self, to: Runner, bell: Bell, gate: int = OPEN) -> None:
        address, _ = self.slots.buffer_info()
        count, first = len(self.program.names), self.program.first
        self.order = Order(self.pinned.address, address, count, first, 1, 0, bell.fd)
        self.over.clear()
        to.send(addressof(self.order), gate, self.over.set)

    def wait(self) -> None:
        assert self.over.wait(PATIENCE_S)


@pytest.mark.parametrize("gate", [UNDECIDED, OPEN])
async def test_who_listens_hears_the_bell_once(library: Library, gate: int) -> None:
    errand = Errand(calls=3)
    for _ in range(ROUNDS):
        heard = asyncio.Event()
        bell = Bell(library, heard.set)
        idle = taken()
        errand.send(idle, bell, gate)
        async with asyncio.timeout(PATIENCE_S):
            await heard.wait()
        idle.decide(OPEN)
        await asyncio.to_thread(errand.wait)
        assert bell.fd >= 0
        bell.silence()
        assert bell.fd == -1
    assert errand.slots[2 * (errand.program.first + 2)] == os.getpid()


def test_a_runner_that_was_not_sent_is_idle_again() -> None:
    idle = taken()
    assert not idle.is_sent
    idle.recall()
    assert runner.take() is idle
    runner.give_back(idle)
