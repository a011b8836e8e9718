"""The events of snapshots: what made one be taken, when it was, and what a restore from one took.

Instants are nanoseconds since the VM's start, like ``t_ns``; durations of a restore count from its call.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from asyncvmm.errors import AsyncVMMError
from asyncvmm.events.base import Event, event_class

Trigger = Literal["heartbeat", "pre_exec", "listener", "parked", "after", "now", "predicate"]
"""What can make a snapshot be taken; ``now`` is a call that waits for nothing."""


@event_class
class SnapshotTrigger(Event):
    """``trigger`` came, and a snapshot is taken ``quiesce_ms`` milliseconds later. ``detail`` says what it was."""

    event: ClassVar[str] = "snapshot.trigger"

    trigger: Trigger
    detail: str
    quiesce_ms: int


@event_class
class SnapshotSaved(Event):
    """The snapshot with the id ``snapshot`` is whole on disk at ``path``.

    ``trigger_ns``, ``paused_ns`` and ``saved_ns`` are the instants at which its trigger came, the last vCPU stood, and
    it was on disk. ``pause_duration_ns`` is how long the guest stood; ``save_duration_ns`` is from trigger to saved.
    ``logical_bytes`` is the guest's memory, ``allocated_bytes`` what the files take. ``difference``: it stands on
    another snapshot.
    """

    event: ClassVar[str] = "snapshot.saved"

    snapshot: str
    path: str
    trigger: Trigger
    trigger_ns: int
    paused_ns: int
    saved_ns: int
    pause_duration_ns: int
    save_duration_ns: int
    logical_bytes: int
    allocated_bytes: int
    difference: bool


@event_class
class SnapshotFailedEvent(Event):
    """A snapshot that was asked for is none; the VM is as it was.

    ``kind`` is the error's class name, CancelledError where nobody waits for it any more. ``trigger``: what had come by
    then. ``path``: the directory it was to be, None for one of its own. ``reason``: what is behind the error, where
    that is known: why nobody waits, or the error that it came of.
    """

    event: ClassVar[str] = "snapshot.failed"

    kind: str
    what: str
    expected: str | None = None
    found: str | None = None
    state: str | None = None
    trigger: Trigger | None = None
    path: str | None = None
    reason: str | None = None

    @classmethod
    def of(
        cls, t_ns: int, error: BaseException, trigger: Trigger | None, path: str | None, reason: str | None = None
    ) -> SnapshotFailedEvent:
        """The event of ``error``, whatever its kind. ``reason``: what an error without words would not say."""
        kind = type(error).__name__
        if not isinstance(error, AsyncVMMError):
            what = "snapshot" if reason else str(error) or "snapshot"
            return cls(t_ns, kind, what, trigger=trigger, path=path, reason=reason)
        if reason is None and isinstance(error.__cause__, AsyncVMMError):
            reason = str(error.__cause__)
        expected, found = (None if fact is None else str(fact) for fact in (error.expected, error.found))
        return cls(t_ns, kind, error.what, expected, found, error.state, trigger, path, reason)


@event_class
class RestoreMapped(Event):
    """The memory of the snapshot with the id ``snapshot`` is the guest's, its state is in place; nothing ran before.

    Where the restore is launched on KVM, that is the state that KVM holds: the devices emulated here follow, and the
    guest may run already, but is answered after that.
    """

    event: ClassVar[str] = "restore.mapped"

    duration_ns: int
    snapshot: str


@event_class
class RestoreFirstExit(Event):
    """A vCPU of the restored guest came back to the host for the first time. On QEMU, which keeps its exits to itself,
    there is no such event."""

    event: ClassVar[str] = "restore.first_exit"

    duration_ns: int


@event_class
class RestoreFirstGuestEvent(Event):
    """The restored guest was heard of for the first time: ``kind`` is the event's name, or ``serial`` for output.

    The faults are those of its vCPUs' threads until then, None where the machine cannot tell.
    """

    event: ClassVar[str] = "restore.first_guest_event"

    duration_ns: int
    kind: str
    minor_faults: int | None = None
    major_faults: int | None = None


@event_class
class RestoreStep(Event):
    """A step that makes a restored guest its own is done, before it is handed out: ``entropy``, ``clock``;
    ``unanswered``: PID 1 did not say that they are."""

    event: ClassVar[str] = "restore.step"

    step: str
    duration_ns: int
