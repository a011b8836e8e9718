"""Whether a VM that keeps account of what is written is to have dirty rings, and how large: said before it is made.

A ring holds back some entries for what is written between two looks whether it is full, of which there is one whenever
the guest is entered. A KVM that emulates much of what a guest does instead, ring 0 or real mode, writes over entries:
there, rings are for those who ask for them; see dirty_ring.py for what becomes of one that was overrun.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import attrs

from asyncvmm.machine.kvm.abi import Capability
from asyncvmm.machine.kvm.fds import check_extension
from asyncvmm.machine.kvm.system import KvmSystem

RING_BYTES: Final = 1 << 16
"""Of each vCPU: 4096 entries. More of them are harvested at one go, while the guest stands: 30,000 pages of a ring of
1 MiB in 4 ms. Here they are as the guest runs, which costs it 20 us for each ring that is full."""

PAYS_FROM_BYTES: Final = 1 << 31
"""Memory from which on it is rings. To find out that a hundred pages were written takes 0.11 ms for 2 GiB and 0.15 ms
for 8; by bitmaps it takes 0.19 ms and 0.59 ms. A VM's creation takes up to 0.06 ms longer with rings: more than they
gain below, for with 256 MiB it is 0.08 ms either way."""

KINDS: Final = (Capability.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, Capability.KVM_CAP_DIRTY_LOG_RING)
"""Newer KVMs offer both; they are the same on x86."""


@attrs.frozen(cache_hash=True)
class RingShape:
    """What KVM_ENABLE_CAP is told: the capability, and bytes for each vCPU. Hashable."""

    capability: int
    size: int


def ring_shape(memory_bytes: int, wanted: int | None = None) -> RingShape | None:
    """The rings of a VM with so much memory; None where it is to have bitmaps.

    wanted: bytes for each vCPU, 0 for none; None leaves it to what pays. Raises KvmUnavailable.
    """
    if wanted is None:
        wanted = RING_BYTES if memory_bytes >= PAYS_FROM_BYTES and enters_guests() else 0
    return within(wanted, largest()) if wanted else None


@cache
def enters_guests(modules: Path = Path("/sys/module")) -> bool:
    """Whether this host's KVM has the processor run a guest whatever mode it is in: AMD's does, Intel's with what it
    calls an unrestricted guest. Other KVMs do not."""
    for parameter in ("kvm_intel/parameters/unrestricted_guest", "kvm_amd/parameters/npt"):
        with suppress(OSError):
            if (modules / parameter).read_text().strip() in ("Y", "1"):
                return True
    return False


def within(wanted: int, largest: RingShape | None) -> RingShape | None:
    """Rings of so many bytes, as far as they are to be had."""
    return None if largest is None else RingShape(largest.capability, min(wanted, largest.size))


@cache
def largest(kinds: tuple[int, ...] = KINDS) -> RingShape | None:
    """The largest rings that this host's KVM has, None if it has none of that kind. Asked once a process.

    Raises KvmUnavailable.
    """
    system = KvmSystem.open()
    try:
        for kind in kinds:
            if most := check_extension(system.fd, kind):
                return RingShape(kind, most)
    finally:
        system.close()
    return None
