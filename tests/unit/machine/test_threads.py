"""Worker threads: what is raised there comes out as it is; where none is to be had it is said, or done here."""

from __future__ import annotations

import threading

import pytest

from asyncvmm.errors import HostError
from asyncvmm.machine.threads import run_in_thread, start_thread
from asyncvmm.machine.waiting import in_thread, in_thread_or_here
from tests.support.cancelling import cancel_work
from tests.support.scarcity import busy_workers, threads_left, workers_left

pytestmark = pytest.mark.anyio


def this_thread() -> threading.Thread:
    return threading.current_thread()


@pytest.mark.parametrize("error", [RuntimeError("wrong"), HostError("something", expected="more")])
async def test_what_the_function_raises_is_raised_and_it_is_called_once(error: Exception) -> None:
    def fail() -> None:
        calls.append(this_thread())
        raise error

    for call in (run_in_thread, in_thread, in_thread_or_here):
        calls: list[threading.Thread] = []
        with pytest.raises(type(error)) as caught:
            await call(fail)
        assert caught.value is error
        assert len(calls) == 1
        assert threading.main_thread() not in calls


async def test_no_thread_to_be_had_is_an_error_in_kind() -> None:
    async with busy_workers():
        with threads_left(0):
            for call in (run_in_thread, in_thread):
                with pytest.raises(HostError, match=r"thread worker: expected a thread .*, found can't start new"):
                    await call(this_thread)
        assert await run_in_thread(this_thread) is not threading.main_thread()


def test_a_thread_that_cannot_be_started_is_an_error_that_names_it() -> None:
    thread = threading.Thread(target=this_thread, name="late", daemon=True)
    with threads_left(0), pytest.raises(HostError, match="thread late: expected"):
        start_thread(thread)
    assert thread not in threading.enumerate()


async def test_what_must_be_done_is_done_here_where_no_thread_is_to_be_had() -> None:
    assert await in_thread_or_here(this_thread) is not threading.main_thread()
    async with workers_left(0):
        assert await in_thread_or_here(this_thread) is threading.main_thread()


async def test_what_must_be_done_is_done_here_although_whoever_asked_for_it_is_cancelled() -> None:
    done: list[threading.Thread] = []
    async with workers_left(0):
        await cancel_work(1, in_thread_or_here(lambda: done.append(this_thread())))
    assert done == [threading.main_thread()]
