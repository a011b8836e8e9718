"""Ring-3 code runs on the processor itself, also where ring 0 is emulated, and its exits are answered as any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.anyio

RING0_ROUNDS, RING3_ROUNDS = 20_000, 20_000_000


async def test_ring_3_makes_exits_and_runs_at_least_as_fast_as_ring_0(boot: Boot) -> None:
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("ring3") as run:
        trace = ExitTrace(run.machine, 100)
        await run.machine.write("console", b"g")
        await run.said(b"3s")
        await run.machine.stop()
        assert run.ends == []
        marks = [entry.t_ns async for entry in trace if getattr(entry.exit, "port", None) == 0x1000]
        assert len(marks) == 4
        ring0_begin, ring0_end, ring3_begin, ring3_end = marks
        ring0_ns = (ring0_end - ring0_begin) / RING0_ROUNDS
        ring3_ns = (ring3_end - ring3_begin) / RING3_ROUNDS
        assert ring3_ns < ring0_ns
