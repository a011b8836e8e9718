"""The control line as a guest has it that polls it: answered without Python while nothing is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Run

pytestmark = [pytest.mark.anyio, pytest.mark.requires("native-library")]

POLLED = "in 0x2fd"


def in_python(run: Run) -> int:
    """Exits that Python has answered."""
    vm = run.machine._vm
    assert vm is not None
    return sum(vcpu.counters.total() for vcpu in vm.vcpus)


async def polled_more(run: Run) -> None:
    """Wait until the guest has looked another hundred times."""
    before = run.count(POLLED)
    with anyio.fail_after(20.0):
        while run.count(POLLED) < before + 100:  # noqa: ASYNC110  (nothing tells of an exit)
            await anyio.sleep(0.001)


async def test_an_idle_guest_polls_it_without_python_and_is_counted_all_the_same(boot: Boot) -> None:
    async with boot("listen") as run:
        await run.said(b">")
        await polled_more(run)
        before = in_python(run), run.machine.activity(), run.machine.progress()
        await polled_more(run)
        after = in_python(run), run.machine.activity(), run.machine.progress()
    assert after[:2] == before[:2]
    assert after[2] >= before[2] + 100
    exits = run.exits
    assert sum(entry.count for entry in exits.by_address.values()) == exits.total == exits.by_reason["IO"].count
    polls = exits.by_address[POLLED]
    assert 0 < polls.min_ns <= polls.max_ns <= polls.total_ns


async def test_every_byte_that_the_host_writes_is_seen(boot: Boot) -> None:
    async with boot("listen") as run:
        await run.said(b">")
        for value in range(5, 105):
            await run.machine.write("control", bytes([value]))
            await run.until(lambda: len(run.output) == value - 3)  # noqa: B023  (awaited here)
        text = bytes(range(5, 256)) * 20
        await run.machine.write("control", text)
        await run.machine.write("control", b"\x04")
        assert (await run.end()).code == 0
        assert run.output == b">" + bytes(range(5, 105)) + text


async def test_a_byte_of_the_time_that_it_was_paused_is_seen_when_it_goes_on(boot: Boot) -> None:
    async with boot("listen") as run:
        await run.said(b">")
        await polled_more(run)
        await run.machine.pause()
        await run.machine.write("control", b"x\x04")
        await run.machine.resume()
        assert (await run.end()).code == 0
        assert run.output == b">x"


async def test_a_trace_shows_the_polls_too(boot: Boot) -> None:
    from asyncvmm.machine.kvm.exits import IoExit
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("listen") as run:
        await run.said(b">")
        trace = ExitTrace(run.machine, 1000)
        with anyio.fail_after(20.0):
            seen = [(await anext(trace)).exit for _ in range(100)]
        await trace.aclose()
        with anyio.fail_after(20.0):  # until it is answered natively again
            before = -1
            while in_python(run) != before:
                before = in_python(run)
                await polled_more(run)
    assert {exit.port for exit in seen if isinstance(exit, IoExit)} == {0x2FD}
