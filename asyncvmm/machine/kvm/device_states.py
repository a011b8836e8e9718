"""The section ``devices`` of a snapshot: each virtio device's registers, queues and own state, by its name.

A section is taken for what somebody made up: everything is checked before it is used (see the devices' ``restore``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from asyncvmm.errors import ConfigError, SnapshotDamaged, SnapshotMismatch
from asyncvmm.snapshot.codec import decode

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.virtio import VirtioSlot

_OF_ANOTHER: Final = frozenset(
    {"saved device id", "saved features", "saved queues", "saved config", "saved ports", "saved disk"}
)
"""What is amiss when the device was made otherwise than the one that was saved."""


def states_of(slots: Sequence[VirtioSlot]) -> dict[str, Any]:
    """The state of every device, as plain values. They must be held, and drained."""
    found = {}
    for slot in slots:
        with slot.lock:
            found[slot.name] = slot.transport.state()
    return found


def restore_states(slots: Sequence[VirtioSlot], section: bytes) -> None:
    """Make devices of no guest yet, which are held, what ``section`` says. Raises SnapshotDamaged, SnapshotMismatch."""
    states = decode(section)
    if not isinstance(states, Mapping):
        raise SnapshotDamaged("saved devices", expected="each device's state", found=repr(states)[:80])
    names = [slot.name for slot in slots]
    if list(states) != names:
        raise SnapshotMismatch("saved devices", expected=", ".join(names), found=", ".join(states)[:400])
    for slot in slots:
        _restore(slot, states[slot.name])


def _restore(slot: VirtioSlot, state: object) -> None:
    if not isinstance(state, Mapping):
        raise SnapshotDamaged(f"saved device {slot.name}", expected="its state", found=repr(state)[:80])
    try:
        with slot.lock:
            slot.transport.restore(state)
    except ConfigError as error:
        kind = SnapshotMismatch if error.what in _OF_ANOTHER else SnapshotDamaged
        raise kind(f"{slot.name}: {error.what}", expected=error.expected, found=error.found) from None
