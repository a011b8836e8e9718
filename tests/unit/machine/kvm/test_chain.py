"""Chains of system calls: both executors do the same, stop at the same failure, and leave nothing behind."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.fastpath.binding import load
from asyncvmm.machine.kvm.fastpath.chain import (
    BEGAN,
    MOST_STEPS,
    NOTHING,
    STEP,
    Chain,
    Executor,
    Program,
    SystemCall,
    executor,
    interpret,
    native,
)

READ, LSEEK, GETPID = 0, 8, 39
NULL = Path("/dev/null")

EXECUTORS: dict[str, Executor] = {"native": native() or interpret, "interpreted": interpret}
both = pytest.mark.parametrize("execute", EXECUTORS.values(), ids=EXECUTORS)


@pytest.fixture
def sparse_file() -> Iterator[int]:
    fd = os.memfd_create("sparse")
    yield fd
    os.close(fd)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def seeks(fd: int, offsets: list[tuple[int, int, int]]) -> Program:
    """lseek gives the offset it was told, an earlier one and something, and is refused what is negative."""
    chain = Chain()
    results = [chain.call("getpid", GETPID)]
    for back, plus, least in offsets:
        base = results[-1 - back % len(results)]
        results.append(chain.call(f"seek {len(results)}", LSEEK, fd, base + plus, os.SEEK_SET, least=least))
    return chain.program()


@given(
    offsets=st.lists(
        st.tuples(st.integers(0, 9), st.integers(-(1 << 20), 1 << 21), st.one_of(st.just(0), st.integers(0, 1 << 22))),
        max_size=20,
    )
)
def test_both_executors_give_the_same_results_and_stop_at_the_same_step(offsets: list[tuple[int, int, int]]) -> None:
    fd = os.memfd_create("sparse")
    try:
        program = seeks(fd, offsets)
        outcomes = []
        for execute in EXECUTORS.values():
            slots = program.template[:]
            done = execute(program.steps, len(program.names), slots.buffer_info()[0], program.first)
            outcomes.append((done, slots[::2].tolist()))
        assert outcomes[0] == outcomes[1]
    finally:
        os.close(fd)


@given(
    content=st.binary(min_size=1, max_size=64),
    moves=st.lists(st.tuples(st.integers(0, 63), st.integers(0, 63), st.integers(0, 64)), max_size=20),
    stores=st.lists(st.tuples(st.integers(0, 56), st.integers(0, (1 << 63) - 1)), max_size=5),
)
def test_both_executors_leave_the_same_in_memory(
    content: bytes, moves: list[tuple[int, int, int]], stores: list[tuple[int, int]]
) -> None:
    chain = Chain(given=1)
    low, high = chain.data(content.ljust(64, b"\1")), chain.data(bytes(64))
    for to, source, size in moves:
        chain.copy(high + to, low + source, min(size, 64 - to, 64 - source))
    for to, value in stores:
        chain.store(low + to, value)
        chain.store(high + to, chain.given(0) + 1)
    program = chain.program()
    made = [program.run(41, execute=execute) for execute in EXECUTORS.values()]
    assert made[0].read(low, 128) == made[1].read(low, 128)
    assert made[0].failure is made[1].failure is None


@both
def test_a_result_is_what_a_later_step_works_on(execute: Executor) -> None:
    chain = Chain()
    fd = chain.open("open", NULL)
    memory = chain.map("mmap", 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    chain.store(memory + 8, fd)
    copied = chain.data(bytes(16))
    chain.copy(copied, memory, 16)
    made = chain.program().run(execute=execute)
    assert made.failure is None
    assert os.readlink(f"/proc/self/fd/{made[fd]}") == "/dev/null"
    assert made.read(copied, 16) == bytes(8) + made[fd].to_bytes(8, "little")
    made.undo()


@both
def test_a_chain_stops_at_its_first_failure_and_says_which_and_why(execute: Executor) -> None:
    before = descriptors()
    chain = Chain()
    chain.open("good", NULL)
    chain.open("bad", NULL / "below")
    chain.open("never", NULL)
    made = chain.program().run(execute=execute)
    assert made.failure is not None
    assert (made.failure.name, made.failure.errno) == ("bad", errno.ENOTDIR)
    assert len(descriptors()) == len(before) + 1
    made.undo()
    assert descriptors() == before


@both
def test_a_result_that_is_too_small_is_a_failure_without_errno(execute: Executor) -> None:
    chain = Chain()
    chain.call("getpid", GETPID, least=1 << 40)
    made = chain.program().run(execute=execute)
    assert made.failure is not None
    assert (made.failure.result, made.failure.errno) == (os.getpid(), 0)


@both
def test_undoing_twice_does_not_close_what_has_the_number_now(execute: Executor) -> None:
    chain = Chain()
    chain.open("open", NULL)
    made = chain.program().run(execute=execute)
    made.undo()
    fd = os.open(NULL, os.O_RDONLY)
    made.undo()
    os.close(fd)


@both
def test_a_mapping_is_undone_as_well(execute: Executor) -> None:
    chain = Chain()
    size = 61 << 12
    memory = chain.map("mmap", size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made = chain.program().run(execute=execute)
    assert is_mapped(made[memory])
    made.undo()
    assert not is_mapped(made[memory])


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


@both
def test_a_call_that_a_signal_interrupts_is_made_again(execute: Executor) -> None:
    reader, writer = os.pipe()
    handled: list[int] = []
    former = signal.signal(signal.SIGUSR1, lambda number, frame: handled.append(number))
    main = threading.get_ident()

    def disturb() -> None:
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGUSR1)
        time.sleep(0.05)
        os.write(writer, b"x")

    thread = threading.Thread(target=disturb)
    try:
        chain = Chain()
        got = chain.call("read", READ, reader, chain.data(bytes(8)), 8)
        thread.start()
        made = chain.program().run(execute=execute)
        assert made[got] == 1
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, former)
        os.close(reader)
        os.close(writer)
    assert handled


@both
def test_times_are_in_order_and_phases_lie_where_their_steps_do(execute: Executor) -> None:
    chain = Chain()
    with chain.phase("outer"):
        chain.call("getpid", GETPID)
        with chain.phase("inner"):
            chain.call("getpid", GETPID)
            chain.call("getpid", GETPID)
        with chain.phase("empty"):
            pass
    before = time.monotonic_ns()
    made = chain.program().run(execute=execute)
    times = {step: made.ended_ns(step) for step in (-1, 0, 2)}
    moments = [before, *times.values(), time.monotonic_ns()]
    assert moments == sorted(moments)
    (outer,) = made.spans()
    assert (outer.name, outer.start_ns, outer.end_ns) == ("outer", times[-1], times[2])
    assert [(span.name, span.start_ns, span.end_ns) for span in outer.children] == [
        ("inner", times[0], times[2]),
        ("empty", times[2], times[2]),
    ]


@both
def test_steps_that_were_made_ahead_take_no_time_of_the_run(execute: Executor) -> None:
    chain = Chain()
    with chain.phase("first"):
        chain.call("getpid", GETPID)
    chain.is_ready_ahead()
    with chain.phase("second"):
        chain.call("getpid", GETPID)
    program = chain.program()
    assert program.ahead == 1
    slots = program.lay_out()
    address, _ = slots.buffer_info()
    assert execute(program.steps, program.ahead, address, program.first) == program.ahead
    began = slots[BEGAN] = time.monotonic_ns()
    rest = program.steps[STEP.size * program.ahead :]
    assert execute(rest, 1, address, program.first + program.ahead) == 1
    made = program.made(slots, 2)
    made.count_from_beginning(program.ahead)
    first, second = made.spans()
    assert (first.start_ns, first.end_ns, second.start_ns) == (began, began, began)
    assert second.end_ns > began


@both
def test_of_a_failed_chain_the_phases_end_with_the_one_that_failed(execute: Executor) -> None:
    chain = Chain()
    for name, fails in (("first", False), ("second", True), ("third", False)):
        with chain.phase(name):
            chain.call(name, GETPID, least=1 << 40 if fails else 0)
    made = chain.program().run(execute=execute)
    first, second = made.spans()
    assert [(span.name, span.failed) for span in (first, second)] == [("first", False), ("second", True)]
    assert 0 < first.start_ns <= first.end_ns == second.start_ns <= second.end_ns


@both
@pytest.mark.parametrize("base", [1, 2, 3, NOTHING - 1])
def test_a_step_that_refers_to_what_is_not_known_yet_is_not_made(execute: Executor, base: int) -> None:
    fd = os.dup(0)
    bases = [NOTHING] * 6
    bases[2] = base
    steps = STEP.pack(SystemCall.CLOSE, False, *bases, fd, *[0] * 5, 0)
    slots = array("q", bytes(16 * 4))
    assert execute(steps, 1, slots.buffer_info()[0], 1) == 0
    assert slots[2] == -errno.EINVAL
    os.close(fd)


@both
def test_a_step_that_may_fail_does_not_end_the_chain(execute: Executor) -> None:
    chain = Chain()
    failed = chain.call("close", SystemCall.CLOSE, -1, may_fail=True)
    after = chain.call("getpid", GETPID)
    made = chain.program().run(execute=execute)
    assert made.failure is None
    assert (made[failed], made[after]) == (-errno.EBADF, os.getpid())


def test_a_chain_cannot_be_written_down_wrongly() -> None:
    chain, other = Chain(given=1), Chain(given=3)
    with pytest.raises(ValueError, match="step 0"):
        chain.call("future", GETPID, other.given(2))
    with pytest.raises(ValueError, match="given value 1"):
        chain.given(1)
    with pytest.raises(ValueError, match="64 bits"):
        chain.call("large", GETPID, 1 << 64)
    with pytest.raises(ValueError, match="least"):
        chain.call("least", GETPID, least=-5)
    with pytest.raises(ValueError, match="0 given values, not 1"):
        chain.program().run()


def test_a_chain_has_an_end() -> None:
    chain = Chain()
    for _ in range(MOST_STEPS):
        chain.call("getpid", GETPID)
    with pytest.raises(ValueError, match="more than"):
        chain.call("getpid", GETPID)


def test_runs_of_one_program_share_nothing_that_is_written() -> None:
    chain = Chain(given=1)
    kept = chain.data(bytes(8))
    chain.store(kept, chain.given(0))
    program = chain.program()
    first, second = program.run(1), program.run(2)
    assert (first.read(kept, 8)[0], second.read(kept, 8)[0]) == (1, 2)


def test_the_library_is_what_makes_chains_where_it_can_be_loaded() -> None:
    library = load()
    assert executor() is (interpret if library is None else library.chain)
