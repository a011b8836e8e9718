"""Waiting for a guest's write to a port, with a guest that writes to two without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
import attrs
import pytest

from asyncvmm.console import Console
from asyncvmm.errors import ConfigError, StateError
from asyncvmm.events.hub import EventHub
from asyncvmm.snapshot.predicates import after, heartbeat, port_write
from asyncvmm.snapshot.watcher import wait_for_trigger
from asyncvmm.x86 import layout
from tests.kvm.conftest import PATIENCE_S

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot, Make, Run

pytestmark = pytest.mark.anyio


async def nowhere(data: bytes) -> None:
    """Take what is written."""


@attrs.define
class Told:
    """What watches were told, each by its name."""

    values: list[tuple[str, int]] = attrs.field(factory=list)
    _more: anyio.Event = attrs.field(factory=anyio.Event)

    def by(self, name: str) -> Callable[[int], None]:
        def told(value: int) -> None:
            self.values.append((name, value))
            self._more.set()
            self._more = anyio.Event()

        return told

    async def until(self, count: int) -> None:
        with anyio.fail_after(PATIENCE_S):
            while len(self.values) < count:
                await self._more.wait()


async def test_who_watches_is_told_once_however_often_the_guest_writes(boot: Boot) -> None:
    told = Told()
    async with boot("beacon") as run:
        watch = run.machine.watch_port
        ends = [
            watch(0x7B, None, told.by("any")),
            watch(0x7B, 200, told.by("200")),
            watch(0x7C, 7, told.by("neighbour")),
            watch(0x7D, None, told.by("silent")),
        ]
        await told.until(3)
        await anyio.sleep(0.05)
        assert sorted(name for name, _ in told.values) == ["200", "any", "neighbour"]
        assert {name: value for name, value in told.values if name != "any"} == {"200": 200, "neighbour": 7}
        for end in ends:
            end()
        watch(0x7B, 5, told.by("again"))
        await told.until(4)


async def fires(run: Run, port: int, value: int | None) -> str:
    events, console = EventHub(), Console(nowhere)
    with anyio.fail_after(PATIENCE_S):
        when = port_write(port, value) & after(1) | heartbeat(1)
        fired = await wait_for_trigger(when, events, console, run.machine.activity, watch_port=run.machine.watch_port)
    return fired.detail


async def test_a_write_to_a_port_is_a_trigger(boot: Boot) -> None:
    async with boot("beacon") as run:
        assert await fires(run, 0x7B, 33) == "0x21 to port 0x7b and 1 ms"
        assert await fires(run, 0x7C, 33) == "0x21 to port 0x7c and 1 ms"


async def test_a_device_s_port_cannot_be_watched(boot: Boot, make: Make) -> None:
    async with boot("beacon") as run:
        for port in (layout.COM1_PORT, layout.DEBUG_EXIT_PORT, -1, 1 << 16):
            with pytest.raises(ConfigError):
                run.machine.watch_port(port, None, print)
    with pytest.raises(StateError):
        make("beacon").machine.watch_port(0x7B, None, print)
