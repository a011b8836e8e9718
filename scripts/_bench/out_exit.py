"""One OUT exit, with bus, device, lock and statistics in, beside a C loop of KVM_RUN and a look at the byte.

Two ports, for they take two ways: the console's transmitter, which the native run loop answers, and COM2's scratch
register, a device's plain register that Python answers. The stop-watch is the guest's: its newlines on COM1 are stamped
natively as they are written, so that no wait for the GIL is in it but those of the exits themselves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import attrs

from _bench.bench import Bench, Skipped
from _bench.build import build_floor, build_guest
from _bench.figure import Figure, Target
from _bench.floor import Floor, running_floor
from _bench.guest import GuestRun, layout_of, plan_of
from _bench.load import CONDITIONS
from _bench.recipe import write_recipe
from _bench.turns import Turns, take_turns_async

MEMORY_MIB = 16
PORTS = {"console-thr": (0x3F8, "native run loop"), "com2-scratch": (0x2FF, "Python")}
"""Port, and who answers it."""

HUNDREDS = 20
HUNDREDS_WAITING = 2
"""Of OUTs that Python answers beside a busy thread: each may wait for the GIL's switch interval, 5 ms."""


@attrs.frozen
class Case:
    """One port under one condition."""

    port: str
    condition: str

    @property
    def hundreds(self) -> int:
        """OUTs in one sample, in hundreds."""
        waiting = self.condition == "busy" and PORTS[self.port][1] == "Python"
        return HUNDREDS_WAITING if waiting else HUNDREDS


async def measure(bench: Bench) -> list[Figure]:
    """out_exit for each port, idle and busy."""
    return [await _measure(bench, Case(port, condition)) for port in PORTS for condition in CONDITIONS]


async def _measure(bench: Bench, case: Case) -> Figure:
    number, answered_by = PORTS[case.port]
    guest = build_guest(bench, "outs", PORT=number, HUNDREDS=case.hundreds)
    recipe = write_recipe(bench.cache / f"{guest.name}.recipe", layout_of(guest, MEMORY_MIB), MEMORY_MIB << 20)
    rounds = bench.rounds(12, 3) if case.condition == "idle" else bench.rounds(6, 2)

    async def ours() -> float:
        run = GuestRun(plan_of(guest, MEMORY_MIB))
        await run.run()
        return _between(run.newlines)

    with running_floor(build_floor(bench, "floor_exit"), str(recipe), str(MEMORY_MIB)) as floor:
        turns = await _under(case.condition, ours, floor, rounds)
    return _figure(case, answered_by, turns)


async def _under(condition: str, ours: Callable[[], Awaitable[float]], floor: Floor, rounds: int) -> Turns:
    async def peer() -> float:
        return floor.sample()

    with CONDITIONS[condition]():
        return await take_turns_async(ours, peer, rounds)


def _between(newlines: list[int]) -> float:
    if len(newlines) != 2:
        raise Skipped(f"the guest was to write two newlines on COM1, and wrote {len(newlines)}")
    return float(newlines[1] - newlines[0])


def _figure(case: Case, answered_by: str, turns: Turns) -> Figure:
    unit = 1000 * 100 * case.hundreds
    return Figure(
        name="out_exit",
        unit="us/exit",
        ours=[value / unit for value in turns.ours],
        peer_name="C loop of KVM_RUN",
        peer=[value / unit for value in turns.peer],
        target=Target("ratio", "<=", 2.0),
        conditions={"python_thread": case.condition, "port": case.port},
        detail={"answered_by": answered_by, "exits_per_sample": 100 * case.hundreds, "aim": 1.5},
    )
