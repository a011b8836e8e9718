"""A bell's descriptor is closed once, by the last who has to do with it, and by nobody twice."""

from __future__ import annotations

import asyncio
import gc
import os

import pytest

from asyncvmm.machine.kvm.bell import Bell
from asyncvmm.machine.kvm.fastpath.binding import Library

pytestmark = [pytest.mark.anyio, pytest.mark.requires("native-library")]


def eventfds() -> int:
    return sum(_target(fd).endswith("[eventfd]") for fd in os.listdir("/proc/self/fd"))


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def unheard() -> None:
    pytest.fail("heard")


async def test_a_bell_that_was_closed_is_not_heard_and_leaves_nothing(library: Library) -> None:
    before = eventfds()
    for end in (Bell.close, Bell.drop, lambda bell: (bell.drop(), bell.close())):
        bell = Bell(library, unheard)
        end(bell)
        await asyncio.sleep(0)
        assert eventfds() == before


async def test_the_descriptor_lasts_until_nobody_listens_or_rings(library: Library) -> None:
    for one, other in ((Bell.deafen, Bell.silence), (Bell.silence, Bell.deafen)):
        bell = Bell(library, unheard)
        one(bell)
        one(bell)
        assert bell.fd >= 0
        other(bell)
        assert bell.fd == -1


async def test_a_bell_is_dropped_from_another_thread(library: Library) -> None:
    before = eventfds()
    bell = Bell(library, unheard)
    await asyncio.to_thread(bell.drop)
    await asyncio.sleep(0.01)
    assert eventfds() == before


def test_a_bell_is_dropped_after_its_loop(library: Library) -> None:
    bells: list[Bell] = []

    async def leave_one() -> None:
        bells.append(Bell(library, unheard))

    before = eventfds()
    asyncio.run(leave_one())
    bells[0].drop()
    assert eventfds() == before


def test_a_bell_is_dropped_while_its_loop_rests_for_good(library: Library) -> None:
    async def leave_one() -> None:
        bells.append(Bell(library, unheard))

    bells: list[Bell] = []
    before, loop = eventfds(), asyncio.new_event_loop()
    loop.run_until_complete(leave_one())
    bells.pop().drop()
    loop.close()
    gc.collect()
    assert eventfds() == before


async def test_a_bell_that_was_lost_goes(library: Library) -> None:
    before = eventfds()
    Bell(library, unheard)
    gc.collect()
    await asyncio.sleep(0)
    assert eventfds() == before


async def test_a_close_that_a_signal_breaks_off_is_not_made_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed_and_interrupted(fd: int) -> None:
        close(fd)
        raise ZeroDivisionError  # as a signal's handler may, behind any call

    close, bell = os.close, Bell(library, unheard)
    number = bell.fd
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", closed_and_interrupted)
        with pytest.raises(ZeroDivisionError):
            bell.close()
    another = os.open("/dev/null", os.O_RDONLY)
    assert another == number
    bell.close()
    del bell
    gc.collect()
    os.fstat(another)
    os.close(another)
