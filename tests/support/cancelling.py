"""Cancels what it is given, and boots wherever they can be cancelled: at each phase, and after many a delay."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any

import anyio
import pytest

from asyncvmm import VM
from asyncvmm.timing.timeline import Span, Timeline, _OpenPhase

DELAYS_S = (0.0, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.008, 0.012, 0.02, 0.03, 0.05, 0.1, 0.2)


async def cancel_work(turns: int, work: Coroutine[Any, Any, object]) -> None:
    """Begin it, cancel it so many turns of the loop later, and wait for it to say that it was."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class Tripwire(Timeline):
    """A timeline that calls ``trip`` when the phase ``name`` begins; it may begin on a worker thread."""

    def __init__(self, name: str, trip: Callable[[], object]) -> None:
        super().__init__()
        self.name = name
        self.trip = trip
        self.tripped = False

    def phase(self, name: str) -> _OpenPhase:
        if name == self.name:
            self.tripped = True
            self.trip()
        return super().phase(name)

    def record_later(self, spans: Callable[[], Iterable[Span]]) -> None:
        """What is recorded when it is over trips then: nothing can come in between."""
        if self.name in _names(spans()):
            self.tripped = True
            self.trip()
        super().record_later(spans)


def _names(spans: Iterable[Span]) -> set[str]:
    return {name for span in spans for name in (span.name, *_names(span.children))}


class Cancelled:
    """``with Cancelled() as scope``: a scope that must have been cancelled by the end of the block."""

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()

    def __enter__(self) -> anyio.CancelScope:
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        swallowed = self._scope.__exit__(kind, value, trace)
        assert kind is None or swallowed, f"the boot ended otherwise: {value!r}"
        return bool(swallowed)


async def cancel_at_phase(vm: VM, phase: str) -> bool:
    """Boot, and cancel that as ``phase`` begins; whether it ever began."""
    from asyncio import get_running_loop

    loop = get_running_loop()
    with Cancelled() as scope:
        wire = Tripwire(phase, lambda: loop.call_soon_threadsafe(scope.cancel))
        vm.timeline = wire
        await vm.boot()
    return wire.tripped


async def cancel_after(vm: VM, delay_s: float) -> bool:
    """Boot, and cancel that ``delay_s`` later; whether the boot was through by then."""
    with Cancelled(), anyio.move_on_after(delay_s) as scope:
        await vm.boot()
    return not scope.cancelled_caught
