"""A flood is handed out in turns, whole and in order; after the end a bounded part of it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.effects import Effect, SerialOutput, Stopped
from asyncvmm.machine.pacing import FINAL_BYTES, TURN_BYTES, Pacer

pytestmark = pytest.mark.anyio


async def hand_out(effects: list[Effect]) -> list[list[Effect]]:
    turns: list[list[Effect]] = []
    done = asyncio.Event()
    Pacer(lambda turn: turns.append(list(turn)), done.set).put(effects)
    await done.wait()
    return turns


def console(turns: list[list[Effect]]) -> bytes:
    return b"".join(effect.data for turn in turns for effect in turn if isinstance(effect, SerialOutput))


async def test_little_is_handed_out_at_once() -> None:
    turns: list[list[Effect]] = []
    output = SerialOutput("console", b"a\n", (1,))
    Pacer(lambda turn: turns.append(list(turn)), lambda: None).put([output])
    assert turns == [[output]]


async def test_a_flood_takes_many_turns_and_the_end_comes_last() -> None:
    data = b"\n" * (10 * TURN_BYTES + 5)
    turns = await hand_out([SerialOutput("console", data, tuple(range(len(data))), lost=3), Stopped("shutdown")])
    assert len(turns) >= 10
    assert console(turns) == data
    assert turns[-1][-1] == Stopped("shutdown")
    outputs = [effect for turn in turns for effect in turn if isinstance(effect, SerialOutput)]
    assert [time for output in outputs for time in output.newlines] == list(range(len(data)))
    assert [output.lost for output in outputs] == [0] * (len(outputs) - 1) + [3]


async def test_what_is_left_at_the_end_is_bounded_and_the_rest_counted() -> None:
    turns: list[list[Effect]] = []
    pacer = Pacer(lambda turn: turns.append(list(turn)), lambda: None)
    data = b"x" * (4 * FINAL_BYTES)
    pacer.put([SerialOutput("console", data), Stopped("shutdown")])
    await pacer.finish()
    outputs = [effect for turn in turns for effect in turn if isinstance(effect, SerialOutput)]
    assert sum(len(output.data) + output.lost for output in outputs) == len(data)
    assert sum(len(output.data) for output in outputs) <= FINAL_BYTES + 2 * TURN_BYTES
    assert turns[-1][-1] == Stopped("shutdown")
    assert not pacer.busy


@given(st.lists(st.integers(0, 3 * TURN_BYTES), max_size=6))
def test_nothing_is_lost_or_reordered(sizes: list[int]) -> None:
    effects: list[Effect] = [SerialOutput("console", bytes([index]) * size) for index, size in enumerate(sizes)]

    async def run() -> bytes:
        return console(await hand_out([*effects, Stopped("reset")]))

    expected = b"".join(bytes([index]) * size for index, size in enumerate(sizes))
    assert asyncio.run(run()) == expected


async def test_what_waits_is_drained_whole_and_in_order_beside_others() -> None:
    turns: list[list[Effect]] = []
    pacer = Pacer(lambda turn: turns.append(list(turn)), lambda: None)
    data = bytes(number % 251 for number in range(20 * TURN_BYTES))
    pacer.put([SerialOutput("console", data)])
    looks: list[int] = []
    looking = asyncio.get_running_loop().call_soon(lambda: looks.append(len(turns)))
    await pacer.drain()
    assert console(turns) == data
    assert not pacer.busy
    assert looks
    assert looks[0] < len(turns)
    looking.cancel()
