"""Which trigger of a SnapshotResources has come: one decision from plain facts (design: snapshots)."""

from __future__ import annotations

import attrs

from asyncvmm.events.snapshot_types import Trigger
from asyncvmm.events.types import GuestExit, GuestHeartbeat, GuestIdle, GuestListener, GuestPreExec
from asyncvmm.snapshot.resources import SnapshotResources


@attrs.frozen
class Fired:
    """``trigger`` has come. ``detail`` says what it was, in a few words.

    ``t_ns`` is when the guest caused it, on the axis of its events, which may lie before anybody waited for it; None
    for what is not one of its events.
    """

    trigger: Trigger
    detail: str
    t_ns: int | None = None


@attrs.frozen(kw_only=True)
class Facts:
    """What has happened so far: the newest heartbeat, the first of everything else, None for what has not come.

    ``idle``: nothing is left in the guest that could still run a workload or listen. ``elapsed_ms`` counts
    from when the guest was ready and somebody waited.
    """

    heartbeat: GuestHeartbeat | None = None
    pre_exec: GuestPreExec | None = None
    listener: GuestListener | None = None
    exit: GuestExit | None = None
    idle: GuestIdle | None = None
    elapsed_ms: float = 0.0


def decide(resources: SnapshotResources, facts: Facts) -> Fired | None:
    """The trigger that has come, None for none yet. The first in this order counts: heartbeat, pre-exec, listener,
    parked, wall clock.
    """
    return (
        _heartbeat(resources, facts)
        or _pre_exec(resources, facts)
        or _listener(resources, facts)
        or _parked(resources, facts)
        or _after(resources, facts)
    )


def impossible(resources: SnapshotResources, facts: Facts) -> str | None:
    """Why none of it can come any more; None as long as one may."""
    waits = resources.at_heartbeat is not None or resources.after_ms is not None
    if resources.or_parked or waits or facts.idle is None:
        return None
    if facts.exit is None:
        return "nothing is left that could run a workload or listen"
    return f"the workload has ended with exit code {facts.exit.code}"


def _heartbeat(resources: SnapshotResources, facts: Facts) -> Fired | None:
    beat = facts.heartbeat
    if resources.at_heartbeat is None or beat is None or beat.counter < resources.at_heartbeat:
        return None
    return Fired("heartbeat", f"heartbeat {beat.counter}", beat.t_ns)


def _pre_exec(resources: SnapshotResources, facts: Facts) -> Fired | None:
    if not resources.on_pre_exec or facts.pre_exec is None:
        return None
    return Fired("pre_exec", "the workload is about to run", facts.pre_exec.t_ns)


def _listener(resources: SnapshotResources, facts: Facts) -> Fired | None:
    # With both armed the pre-exec wins: it comes before the workload can listen, whatever is heard of first.
    if not resources.on_listener or resources.on_pre_exec or facts.listener is None:
        return None
    return Fired("listener", f"{facts.listener.proto} port {facts.listener.port}", facts.listener.t_ns)


def _parked(resources: SnapshotResources, facts: Facts) -> Fired | None:
    if facts.idle is None or not resources.or_parked:
        return None
    awaited = [("pre-exec", resources.on_pre_exec), ("listener", resources.on_listener)]
    names = " and ".join(name for name, armed in awaited if armed)
    return Fired("parked", f"no {names} can come any more", facts.idle.t_ns) if names else None


def _after(resources: SnapshotResources, facts: Facts) -> Fired | None:
    if resources.after_ms is None or facts.elapsed_ms < resources.after_ms:
        return None
    return Fired("after", f"{resources.after_ms} ms")
