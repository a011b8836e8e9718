"""What a vCPU knows of its thread, without KVM: it is never entered here."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator

import pytest

from asyncvmm.bus import Bus
from asyncvmm.effects import Stopped
from asyncvmm.machine.kvm.faults import Faults, thread_faults
from asyncvmm.machine.kvm.vcpu import Vcpu

MANY = 1000


@pytest.fixture
def vcpu() -> Iterator[Vcpu]:
    page = (ctypes.c_char * mmap.PAGESIZE)()
    vcpu = Vcpu(0, -1, ctypes.addressof(page), len(page))
    vcpu.order("stop")
    yield vcpu
    vcpu.close()


def halt(stopped: Stopped) -> None:
    pytest.fail(stopped.detail)


def touch() -> None:
    pages = mmap.mmap(-1, MANY * mmap.PAGESIZE)
    for place in range(0, len(pages), mmap.PAGESIZE):
        pages[place] = 1
    pages.close()


def test_page_faults_of_a_thread_that_serves_another_by_then_are_not_the_ended_vcpu_s(vcpu: Vcpu) -> None:
    seen: list[Faults] = []

    def run() -> None:
        serve = vcpu.adopt(threading.current_thread(), threading.get_ident(), thread_faults(), Bus(), halt)
        touch()
        serve(None)
        seen.append(vcpu.faults())
        touch()
        seen.append(vcpu.faults())

    on_a_thread(run)
    assert seen[0].minor >= MANY
    assert seen == [vcpu.faults()] * 2


def test_page_faults_before_a_vcpu_was_adopted_are_not_its_own(vcpu: Vcpu) -> None:
    def run() -> None:
        touch()
        vcpu.adopt(threading.current_thread(), threading.get_ident(), thread_faults(), Bus(), halt)(None)

    on_a_thread(run)
    assert vcpu.faults().minor < MANY


def on_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
