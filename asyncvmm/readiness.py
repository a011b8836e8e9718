"""Readiness: waiting for a guest's READY, and the evidence where it does not come."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypedDict

import anyio

from asyncvmm.effects import ExitStatistics, Stopped
from asyncvmm.errors import BootError
from asyncvmm.events.hub import EventHub
from asyncvmm.machine.base import Evidence, Machine


class GuestFacts(TypedDict):
    """The evidence every GuestError carries; see errors.GuestError."""

    reason: str
    last_exit: str | None
    rip: int | None
    exits: ExitStatistics | None
    phases: Mapping[str, int]
    serial_tail: bytes
    state: str


FactsOf = Callable[[str, Evidence], GuestFacts]
"""All that is known of a guest, with the reason and where it stands."""


class Readiness:
    """That of one guest. It has ``timeout_s`` seconds in all, and ``stall_timeout_s`` without a sign of life.

    ``events`` are the guest's, ``facts`` what its errors carry.
    """

    def __init__(self, events: EventHub, facts: FactsOf, timeout_s: float, stall_timeout_s: float) -> None:
        self._events = events
        self._facts = facts
        self._timeout_s = timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._early_end: BootError | None = None
        self._waiting: anyio.CancelScope | None = None

    async def wait(self, machine: Machine) -> None:
        """Until READY. Raises BootError: what ``end`` was given, or that the guest was given up."""
        deadline = anyio.current_time() + self._timeout_s
        seen = -1
        while (left := deadline - anyio.current_time()) > 0:
            with anyio.move_on_after(min(left, self._stall_timeout_s)) as self._waiting:
                if self._early_end is None:
                    await self._events.ready
                    return
            if self._early_end is not None:
                raise self._early_end
            progress = machine.progress()
            if progress == seen and left > self._stall_timeout_s:
                raise await self._given_up(machine, "stalled", f"no sign of life for {self._stall_timeout_s:g} s")
            seen = progress
        raise await self._given_up(machine, "timeout", f"not ready within {self._timeout_s:g} s")

    def end(self, error: BootError) -> None:
        """The guest has ended: have ``wait`` raise the error, now or when it is called.

        Nobody else hears of it before, so that what evidence is missing can be looked for first.
        """
        self._early_end = error
        if self._waiting is not None:
            self._waiting.cancel()

    async def _given_up(self, machine: Machine, reason: str, found: str) -> BootError:
        evidence = await machine.evidence()
        return BootError("boot", expected="READY", found=found, **self._facts(reason, evidence))


def describe_end(stopped: Stopped) -> str:
    """How a guest ended, for an error's ``found``."""
    if stopped.reason == "debug-exit":
        return f"debug exit with {stopped.code}"
    if stopped.reason == "init-error":
        return f"init-error ({_init_error(stopped.detail)})"
    return f"{stopped.reason} ({stopped.detail})" if stopped.detail else stopped.reason


def _init_error(detail: str) -> str:
    """What PID 1 could not do: ``root=22`` is a root file system that mount(2) refused with that errno."""
    what, _, number = detail.partition("=")
    reason = os.strerror(int(number)) if number.isdigit() and len(number) < 5 else number
    return f"{'the root file system' if what == 'root' else what}: {reason}"


async def complete(error: BootError, machine: Machine | None) -> None:
    """Add what a guest's last words do not say: where it stands."""
    if machine is not None and (error.rip is None or error.last_exit is None):
        evidence = await machine.evidence()
        error.rip = evidence.rip if error.rip is None else error.rip
        error.last_exit = error.last_exit or evidence.last_exit
