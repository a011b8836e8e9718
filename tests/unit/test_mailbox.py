from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.mailbox import Mailbox

LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]

with_either_loop = pytest.mark.parametrize("new_loop", LOOPS, ids=["asyncio", "uvloop"])


def test_only_the_post_that_finds_it_empty_wakes_the_loop() -> None:
    wakes: list[None] = []
    mailbox: Mailbox[int] = Mailbox(lambda: wakes.append(None))
    assert mailbox.post(1)
    assert mailbox.post(2)
    assert len(wakes) == 1
    assert mailbox.drain() == [1, 2]
    mailbox.post(3)
    assert len(wakes) == 2


def test_draining_an_empty_mailbox_gives_nothing_and_wakes_nobody() -> None:
    mailbox: Mailbox[int] = Mailbox(lambda: pytest.fail("woken"))
    assert mailbox.drain() == []


def test_what_a_batch_leaves_behind_wakes_the_loop_again() -> None:
    wakes: list[None] = []
    mailbox: Mailbox[int] = Mailbox(lambda: wakes.append(None))
    for number in range(5):
        mailbox.post(number)
    assert mailbox.drain(2) == [0, 1]
    assert len(wakes) == 2
    assert mailbox.drain(3) == [2, 3, 4]
    assert len(wakes) == 2


def test_a_full_mailbox_drops_and_counts_the_droppable_first() -> None:
    mailbox: Mailbox[str] = Mailbox(lambda: None, capacity=2)
    assert [mailbox.post("trace", droppable=True) for _ in range(4)] == [True, True, False, False]
    assert [mailbox.post("stopped") for _ in range(3)] == [True, True, False]
    assert mailbox.dropped == 3
    assert mailbox.drain() == ["trace", "trace", "stopped", "stopped"]
    assert mailbox.post("trace", droppable=True)


def test_a_closed_mailbox_drops_and_counts_everything() -> None:
    mailbox: Mailbox[int] = Mailbox(lambda: None)
    mailbox.post(1)
    mailbox.close()
    mailbox.close()
    assert not mailbox.post(2)
    assert mailbox.dropped == 2
    assert mailbox.drain() == []


@with_either_loop
def test_posting_to_a_closed_loop_is_dropped_not_raised(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = new_loop()
    mailbox: Mailbox[int] = Mailbox(lambda: loop.call_soon_threadsafe(lambda: None))
    loop.close()
    assert not mailbox.post(1)
    assert not mailbox.post(2)
    assert mailbox.closed
    assert mailbox.dropped == 2


@with_either_loop
@pytest.mark.parametrize("batch", [None, 7])
def test_no_item_and_no_wake_up_is_lost_between_threads_and_the_loop(
    new_loop: Callable[[], asyncio.AbstractEventLoop], batch: int | None
) -> None:
    posters, each = 4, 5000
    received: list[tuple[int, int]] = []

    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def drain() -> None:
            received.extend(mailbox.drain(batch))
            if len(received) == posters * each:
                done.set()

        mailbox: Mailbox[tuple[int, int]] = Mailbox(lambda: loop.call_soon_threadsafe(drain))

        def post(poster: int) -> None:
            for number in range(each):
                assert mailbox.post((poster, number))

        threads = [threading.Thread(target=post, args=(poster,)) for poster in range(posters)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done.wait(), 60)
        for thread in threads:
            thread.join()
        assert len(mailbox) == 0

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    for poster in range(posters):
        assert [number for who, number in received if who == poster] == list(range(each))


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@with_either_loop
@pytest.mark.usefixtures("frequent_thread_switches")
def test_threads_that_wait_for_each_answer_never_meet_a_loop_left_asleep(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    posters, rounds = 3, 1000
    answers = [threading.Semaphore(0) for _ in range(posters)]
    answered = 0

    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def drain() -> None:
            nonlocal answered
            for poster in mailbox.drain():
                answers[poster].release()
                answered += 1
            if answered == posters * rounds:
                done.set()

        mailbox: Mailbox[int] = Mailbox(lambda: loop.call_soon_threadsafe(drain))

        def post(poster: int) -> None:
            for _ in range(rounds):
                mailbox.post(poster)
                if not answers[poster].acquire(timeout=30):
                    return

        threads = [threading.Thread(target=post, args=(poster,)) for poster in range(posters)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done.wait(), 30)
        for thread in threads:
            thread.join()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


@with_either_loop
def test_threads_may_post_while_the_loop_closes(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = new_loop()
    received: list[int] = []
    mailbox: Mailbox[int] = Mailbox(lambda: loop.call_soon_threadsafe(lambda: received.extend(mailbox.drain())))
    posted, over = [0], threading.Event()

    def post() -> None:
        while not mailbox.closed and not over.is_set():
            mailbox.post(posted[0])
            posted[0] += 1

    thread = threading.Thread(target=post)
    thread.start()
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()
    mailbox.close()  # as the shell does; a loop that closes before its wake-up ran leaves nobody to notice
    thread.join(60)
    over.set()
    assert not thread.is_alive()
    assert received == list(range(len(received)))
    assert len(received) + mailbox.dropped == posted[0]


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=40))
def test_items_come_out_in_order_and_whatever_waits_has_woken_the_loop(steps: list[int | None]) -> None:
    wakes = 0
    sent, got = 0, list[int]()

    def wake() -> None:
        nonlocal wakes
        wakes += 1

    mailbox: Mailbox[int] = Mailbox(wake)
    for step in steps:
        if step is None:
            mailbox.post(sent)
            sent += 1
        else:
            wakes = 0
            got += mailbox.drain(step)
        assert wakes == (1 if len(mailbox) else 0) or step is None
        assert not len(mailbox) or wakes >= 1
    got += mailbox.drain()
    assert got == list(range(sent))
