"""Page faults are counted by thread, one's own and another's alike."""

from __future__ import annotations

import mmap
import threading

from asyncvmm.machine.kvm.faults import NO_FAULTS, Faults, faults_of, thread_faults

PAGES = 500


def touch_pages() -> None:
    with mmap.mmap(-1, PAGES * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in range(PAGES):
            memory[page * mmap.PAGESIZE] = 1


def test_this_thread_s_faults_are_counted() -> None:
    before = thread_faults()
    touch_pages()
    assert (thread_faults() - before).minor >= PAGES


def test_another_thread_s_faults_are_its_own() -> None:
    touched, seen = threading.Event(), threading.Event()

    def other() -> None:
        touch_pages()
        touched.set()
        seen.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    before = thread_faults()
    assert touched.wait(10)
    assert thread.native_id is not None
    assert faults_of(thread.native_id).minor >= PAGES
    assert (thread_faults() - before).minor < PAGES
    seen.set()
    thread.join()


def test_a_thread_that_is_not_there_has_none() -> None:
    beyond_any = 1 << 22
    assert faults_of(beyond_any) == NO_FAULTS


def test_faults_are_added_and_subtracted() -> None:
    assert Faults(3, 1) + Faults(2, 2) - Faults(1, 3) == Faults(4, 0)
