"""The console through a guest's eyes: polled, by interrupts, and with more than fits, in both directions."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

from asyncvmm.errors import StateError

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Make

pytestmark = pytest.mark.anyio

RECEIVE_BUFFER, RECEIVE_SIZE = 0x200000, 20_000
PATTERN = bytes(1 + index * 7 % 251 for index in range(RECEIVE_SIZE))


async def test_twenty_thousand_polled_bytes_arrive_complete_and_in_order(boot: Boot) -> None:
    async with boot("output") as run:
        assert (await run.end()).code == 0
        assert run.output == bytes(index % 256 for index in range(20_000))
        assert run.lost == 0
        assert run.count("out 0x3f8") == 20_000
        assert run.count("in 0x3fd") == 20_000


async def test_every_newline_has_its_time_and_the_times_ascend(boot: Boot) -> None:
    from asyncvmm.effects import SerialOutput

    async with boot("output") as run:
        await run.end()
        batches = [effect for effect in run.effects if isinstance(effect, SerialOutput)]
    for batch in batches:
        assert len(batch.newlines) == batch.data.count(b"\n")
    times = [time_ns for batch in batches for time_ns in batch.newlines]
    assert len(times) == 20_000 // 256 + 1
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["echo-ioapic", "echo-pic"])
async def test_bytes_received_by_interrupt_are_echoed_by_interrupt(boot: Boot, name: str) -> None:
    text = bytes(range(5, 256)) * 2
    async with boot(name) as run:
        await run.said(b">")
        for start in range(0, len(text), 37):
            await run.machine.write("console", text[start : start + 37])
            await anyio.lowlevel.checkpoint()
        await run.machine.write("console", b"\x04")
        assert (await run.end()).code == 0
        assert run.output == b">" + text


async def test_single_bytes_come_back_one_by_one(boot: Boot) -> None:
    async with boot("echo-ioapic") as run:
        await run.said(b">")
        for index in range(20):
            await run.machine.write("console", bytes([0x41 + index]))
            await run.until(lambda: len(run.output) == index + 2)  # noqa: B023  (awaited here)
        assert run.output == b">" + bytes(range(0x41, 0x41 + 20))


async def test_a_write_beyond_the_backlog_waits_for_room_and_loses_nothing(boot: Boot) -> None:
    async with boot("receive") as run:
        await run.said(b".")
        await run.machine.write("console", PATTERN)
        assert (await run.end()).code == 0
        vm = run.machine._vm
        assert vm is not None
        assert vm.memory.read(RECEIVE_BUFFER, RECEIVE_SIZE) == PATTERN


async def test_writers_do_not_mix_their_bytes(boot: Boot) -> None:
    async with boot("receive") as run:
        await run.said(b".")
        async with anyio.create_task_group() as tasks:
            for letter in b"abcd":
                tasks.start_soon(run.machine.write, "console", bytes([letter]) * (RECEIVE_SIZE // 4))
        await run.end()
        vm = run.machine._vm
        assert vm is not None
        received = vm.memory.read(RECEIVE_BUFFER, RECEIVE_SIZE)
    assert sorted(received[:: RECEIVE_SIZE // 4]) == sorted(b"abcd")
    assert sum(a != b for a, b in itertools.pairwise(received)) == 3


async def test_a_write_cancelled_midway_leaves_the_port_usable(boot: Boot) -> None:
    async with boot("receive") as run:
        await run.said(b".")
        await run.machine.pause()
        with anyio.move_on_after(0.02) as scope:
            await run.machine.write("console", b"a" * 50_000)
        assert scope.cancelled_caught
        board = run.machine._board
        assert board is not None
        rest = RECEIVE_SIZE - board.console.device.received
        await run.machine.resume()
        await run.machine.write("console", b"b" * rest)
        await run.end()
        vm = run.machine._vm
        assert vm is not None
        received = vm.memory.read(RECEIVE_BUFFER, RECEIVE_SIZE)
    first = received.count(b"a")
    assert 0 < first < 50_000
    assert received == b"a" * first + b"b" * rest


async def test_a_write_that_waits_for_room_hears_of_the_machines_end(boot: Boot) -> None:
    async with boot("spin") as run:
        await run.said(b".")
        refused: list[StateError] = []

        async def write() -> None:
            try:
                await run.machine.write("console", bytes(50_000))
            except StateError as error:
                refused.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await anyio.sleep(0.01)
            assert not refused
            await run.machine.stop()
        assert len(refused) == 1


async def test_input_to_a_machine_that_was_never_started_is_refused(make: Make) -> None:
    with pytest.raises(StateError):
        await make("toy").machine.write("console", b"x")


@pytest.mark.stalls
async def test_output_while_the_loop_is_blocked_is_bounded_and_the_loss_is_counted(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("serial", "serial_output"):
        monkeypatch.setattr(f"asyncvmm.devices.{name}.OUTPUT_CAP", 2000)
    async with boot("flood") as run:
        await run.said(b"x")
        before = run.exits.total
        while run.exits.total < before + 4000:
            time.sleep(0.01)  # noqa: ASYNC251  (a program that blocks its loop is the point)
        seen = len(run.effects)
        await run.until(lambda: run.lost)
        assert all(len(effect.data) <= 2000 for effect in run.effects[seen:] if hasattr(effect, "data"))
        await run.machine.stop()
        assert len(run.output) + run.lost == run.count("out 0x3f8")


async def test_an_unfinished_line_is_handed_out_by_stop(boot: Boot) -> None:
    async with boot("partial") as run:
        while run.count("out 0x3f8") < 7:
            await anyio.lowlevel.checkpoint()
        await run.machine.stop()
        assert run.output == b"no end!"


async def test_nothing_is_handed_out_after_stop(boot: Boot) -> None:
    async with boot("sequence") as run:
        await run.said(b"\x20")
        await run.machine.stop()
        heard = len(run.effects)
        await anyio.sleep(0.02)
        assert len(run.effects) == heard
        assert len(run.output) == run.count("out 0x3f8")
