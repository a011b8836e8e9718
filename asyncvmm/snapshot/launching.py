"""Launching: a restore whose VM is made on a thread outside of the interpreter (see kvm/launch.py).

So is every restore of a KVM machine with one vCPU and without devices, from the second one of a snapshot on: what it
takes is prepared a moment after a restore, when the restored guest is on its way, and what needs no VM is made.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import attrs

from asyncvmm.errors import AsyncVMMError, ConfigError, HostError
from asyncvmm.machine.kvm.runner import any_idle, make_one
from asyncvmm.machine.saved import RestorePlan
from asyncvmm.machine.waiting import in_thread, wait_out
from asyncvmm.snapshot.shell_pool import REFILL_AFTER_S, ShellPool
from asyncvmm.snapshot.snapshot import LaunchKind, Snapshot

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.launch import Launch

_log = logging.getLogger("asyncvmm.snapshot")


def _flag(_: object, attribute: attrs.Attribute[bool], value: bool) -> None:
    if not isinstance(value, bool):
        raise ConfigError(attribute.name, expected="True or False", found=repr(value)[:80])


Wanted = tuple[bool, bool, bool, ShellPool | None]
"""RestoreOptions' fields, of which one is not made before the launch is sent: that takes some microseconds."""


@attrs.frozen
class RestoreOptions:
    """How to restore. prefetch: make the working set present ahead, where it is known. track_dirty: differences are to
    be saved of it. paused: leave its vCPUs held. shells: take a VM that was made ahead from there."""

    prefetch: bool = attrs.field(validator=_flag)
    track_dirty: bool = attrs.field(validator=_flag)
    paused: bool = attrs.field(validator=_flag)
    shells: ShellPool | None

    def plan(self, snapshot: Snapshot) -> RestorePlan:
        """What the machine restores."""
        return snapshot.restore_plan(prefetch=self.prefetch, track_dirty=self.track_dirty)

    @property
    def kind(self) -> LaunchKind:
        """What launches are prepared for."""
        return self.prefetch, self.track_dirty, self.shells is not None


def begin(snapshot: Snapshot, wanted: Wanted, *, at_once: bool) -> Launch | None:
    """Send what is prepared on its way; None where nothing is. Unless ``at_once``, its guest is not entered before
    ``decide``.

    Raises ConfigError for what is asked wrongly, StateError for the shells.
    """
    prefetch, track_dirty, paused, shells = wanted
    if not (type(prefetch) is type(track_dirty) is type(paused) is bool):
        RestoreOptions(*wanted)  # says which
    if shells is not None and not isinstance(shells, ShellPool):
        raise ConfigError("shells", expected="a ShellPool or None", found=repr(shells)[:80])
    prepared = snapshot.prepared.get((prefetch, track_dirty, shells is not None))
    if prepared is None:
        return None
    enters = enters_ahead(snapshot, paused) if at_once else None
    if shells is None:
        return prepared.begin(enters)
    return prepared.begin(enters, lambda: shells.take_ready(RestoreOptions(*wanted).plan(snapshot)))


def enters_ahead(snapshot: Snapshot, paused: bool) -> bool:
    """Whether the guest is entered as soon as it is there. Else it is held for what must be told before it runs."""
    return not paused and not snapshot.guest.has_pid1


class Preparation:
    """Has the next restore like one that is done prepared for, a little later. On the loop."""

    def __init__(self, snapshot: Snapshot, options: RestoreOptions) -> None:
        self._snapshot = snapshot
        self._options = options
        self._preparing: asyncio.Task[None] | None = None
        self._fits = _can_be_launched(snapshot)
        later = asyncio.get_running_loop().call_later
        self._later = later(REFILL_AFTER_S, self._begin) if self._fits else None

    async def aclose(self) -> None:
        """Until it is done. May be called again."""
        if self._later is not None:
            self._later.cancel()
            self._begin()
        if self._preparing is not None:
            await wait_out(self._preparing)

    async def renew(self) -> None:
        """The working set has become known, which the next one is to make present."""
        if self._preparing is not None:
            await wait_out(self._preparing)  # what it prepares is of no use any more
        if self._fits and self._later is None:
            await self._prepare_and_arm()

    def _begin(self) -> None:
        self._later = None
        if self._options.kind in self._snapshot.prepared and any_idle():
            self._arm()
        else:
            self._preparing = asyncio.get_running_loop().create_task(self._prepare_and_arm())

    async def _prepare_and_arm(self) -> None:
        try:
            await in_thread(self._prepare)
        except HostError as error:
            _log.debug("no launch of %s prepared: %s", self._snapshot.path, error)
        self._arm()

    def _arm(self) -> None:
        prepared = self._snapshot.prepared.get(self._options.kind)
        if prepared is None or self._snapshot.closed:
            return
        prepared.arm()
        if self._snapshot.closed:
            prepared.retire()

    def _prepare(self) -> None:
        """On a worker thread."""
        from asyncvmm.machine.kvm.launch import prepare_launch

        snapshot, options = self._snapshot, self._options
        try:
            if options.kind not in snapshot.prepared:
                plan = options.plan(snapshot)
                prepared = prepare_launch(plan, in_shell=options.shells is not None)
                if prepared is not None:
                    snapshot.prepared.setdefault(options.kind, prepared)  # another restore's may have come first
                if options.plan(snapshot) is not plan:  # the working set has become known meanwhile
                    snapshot.forget_prepared(options.kind)
            make_one()
        except AsyncVMMError as error:
            _log.debug("no launch of %s prepared: %s", snapshot.path, error)


def _can_be_launched(snapshot: Snapshot) -> bool:
    manifest = snapshot.manifest
    return manifest.machine == "kvm" and manifest.vcpus == 1 and not snapshot.config.devices.count
