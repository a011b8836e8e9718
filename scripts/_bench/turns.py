"""Taking turns: A B A B, so that what drifts on the host drifts for both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs


@attrs.frozen
class Turns:
    """The samples of both sides, warm-up left out."""

    ours: list[float] = attrs.field(factory=list)
    peer: list[float] = attrs.field(factory=list)


def take_turns(ours: Callable[[], float], peer: Callable[[], float], rounds: int, warm_up: int = 1) -> Turns:
    """Measure both in turns, ``rounds`` times each, after ``warm_up`` unrecorded ones."""
    turns = Turns()
    for number in range(warm_up + rounds):
        a, b = ours(), peer()
        if number >= warm_up:
            turns.ours.append(a)
            turns.peer.append(b)
    return turns


async def take_turns_async(
    ours: Callable[[], Awaitable[float]], peer: Callable[[], Awaitable[float]], rounds: int, warm_up: int = 1
) -> Turns:
    """As ``take_turns``, for coroutines."""
    turns = Turns()
    for number in range(warm_up + rounds):
        a, b = await ours(), await peer()
        if number >= warm_up:
            turns.ours.append(a)
            turns.peer.append(b)
    return turns
