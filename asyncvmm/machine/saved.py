"""What passes between a machine and a snapshot: plain records, and the memory file as a descriptor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from asyncvmm.snapshot.memory_map import MemoryMap, Run

MachineKind = Literal["kvm", "qemu"]


@attrs.frozen(kw_only=True)
class SavedMachine:
    """A machine as it stood when its vCPUs were held, its memory apart.

    regions: RAM as guest address and size, in the order in which it lies in the memory file. sections: the state by
    name, as bytes (on KVM ``vm``, ``board``, ``devices`` and a ``vcpu<n>`` each; on QEMU its own stream, ``qemu``).
    cpu: what a host's CPU must offer to run it on, plain values. memory: what the memory file holds.
    """

    accel: MachineKind
    vcpus: int
    regions: tuple[Run, ...]
    sections: Mapping[str, bytes]
    cpu: Mapping[str, Any]
    memory: MemoryMap


@attrs.frozen(kw_only=True)
class MemoryLayer:
    """One memory file: a descriptor that stays the snapshot's, and what is in it."""

    fd: int
    map: MemoryMap


@attrs.frozen(kw_only=True)
class RestorePlan:
    """What to restore. layers: the memory files, the full one first, then each difference on the one before.

    touched, written: runs known from an earlier restore to be read, and written, before the guest's first event; they
    are made present ahead. Empty for none. track_dirty: whether differences are to be saved of the restored machine.
    ring_bytes: as in BootPlan. devices: how many virtio devices it has.
    """

    saved: SavedMachine
    layers: tuple[MemoryLayer, ...]
    touched: tuple[Run, ...] = ()
    written: tuple[Run, ...] = ()
    track_dirty: bool = False
    ring_bytes: int | None = None
    devices: int = 0
