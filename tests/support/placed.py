"""A boot watched closely: when each line of the control line arrived, and where the guest's clock places its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import attrs

from asyncvmm.console import Console
from asyncvmm.effects import Effect, SerialOutput, Stopped
from asyncvmm.events.hub import EventHub
from asyncvmm.events.types import Event, GuestBootTime, SerialLine
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.timeline import Timeline
from asyncvmm.watch import GuestInstant, GuestWatch


async def _nowhere(data: bytes) -> None:
    pass


@attrs.define
class Placed:
    """What a GuestWatch made of one boot. All times are t_ns."""

    timeline: Timeline
    guest_instant: GuestInstant = lambda tsc: None
    events: list[Event] = attrs.field(factory=list)
    ends: list[Stopped] = attrs.field(factory=list)
    watch: GuestWatch = attrs.field(init=False)
    hub: EventHub = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.hub = EventHub()
        self.watch = GuestWatch(
            self.hub,
            Console(_nowhere),
            self.timeline,
            self.ends.append,
            serial_lines=True,
            guest_instant=lambda tsc: self.guest_instant(tsc),
        )
        self.hub.attach(self.events.append)

    def take(self, effects: Sequence[Effect]) -> None:
        """An EffectSink."""
        self.watch.take(effects)

    def take_late(self, effects: Sequence[Effect]) -> None:
        """The same from a host that reads only now what the guest wrote."""
        now = self.timeline.clock()
        for effect in effects:
            if isinstance(effect, SerialOutput):
                effect = attrs.evolve(effect, newlines=(now,) * effect.data.count(b"\n"))
            self.take([effect])

    def now(self) -> int:
        """The present."""
        return self.timeline.clock() - self.timeline.start_ns

    async def until(self, condition: Callable[[], object], patience_s: float) -> None:
        """Until what was heard makes ``condition`` true."""
        with anyio.fail_after(patience_s):
            while not condition():
                assert not self.ends, self.ends
                await anyio.sleep(0.005)

    @property
    def captured(self) -> bool:
        """Whether the last stage has been told."""
        return not self.watch.contract.capturing

    @property
    def clock(self) -> GuestClock:
        """The guest's clock."""
        clock = self.watch.guest_clock
        assert clock is not None
        return clock

    def at(self, stage: str) -> int:
        """Where the guest's clock places a stage."""
        return self.clock.host_ns(self._boot_time(stage).guest_ns)

    def arrived(self, stage: str) -> int:
        """When a stage's line arrived."""
        return self._boot_time(stage).t_ns

    def line(self, text: str) -> int:
        """When a line arrived on the control line."""
        return next(
            event.t_ns
            for event in self.events
            if isinstance(event, SerialLine) and (event.port, event.text) == ("control", text)
        )

    def _boot_time(self, stage: str) -> GuestBootTime:
        return next(event for event in self.events if isinstance(event, GuestBootTime) and event.stage == stage)
