"""What a guest writes, told by KVM's dirty rings (KVM API, KVM_CAP_DIRTY_LOG_RING): one of each vCPU, of a fixed size.

A bitmap is looked through from end to end whenever it is read; of a ring only what was written is. A vCPU whose ring is
nearly full comes out of the guest (KVM_EXIT_DIRTY_RING_FULL), and its thread makes room.

A page whose entry was harvested is watched again only from KVM_RESET_DIRTY_RINGS on: it must not be copied before that.
And what a processor has yet to tell KVM (Intel's page modification log) comes into the ring when the vCPU leaves the
guest: what is collected while one runs may lack its newest writes, which the next call names; where none runs, nothing
is lacking.

KVM keeps some entries in reserve for what is written before the exit. Where it emulates instructions at length instead
of entering the guest they are too few: it writes over entries then, and says nothing. A ring that is found full to the
last entry counts as overrun, as does one that cannot be reset: everything counts as written from then on, and the log
is turned off, for such a ring is out of step with the kernel's idea of it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Final

from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.dirty import DirtyLog, HostWrites
from asyncvmm.machine.kvm.dirty_gfns import DirtyGfns
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.x86.layout import Region

_log = logging.getLogger("asyncvmm.machine")

_MOST_RESETS: Final = 100
"""Calls in a row that reset nothing: Linux breaks off for a signal, and says only how far it got."""


class DirtyRing(DirtyLog):
    """DirtyLog of a VM that was created with rings. ``make_room`` is for the vCPUs' threads, beside any other call."""

    def __init__(
        self,
        vm_fd: int,
        regions: Sequence[Region],
        host_address: int,
        host: HostWrites,
        rings: Sequence[DirtyGfns],
        *,
        is_on: bool = False,
    ) -> None:
        super().__init__(vm_fd, regions, host_address, host, is_on=is_on)
        self._rings = rings
        self._size = sum(region.size for region in regions)
        self._lock = threading.Lock()
        self._to_reset = self._resets = 0
        self._resets_seen: dict[int, int] = {}
        self._harvested: list[int] = []
        self._earlier: PageSet | None = None
        self.is_overrun = False
        """Whether a ring was: it is not known any more what is written."""

    def end(self) -> None:
        """Log no more. Raises HostError."""
        super().end()
        self._take()

    def make_room(self, index: int) -> None:
        """The ring of that vCPU is full: take note of what is in all of them. Raises HostError."""
        with self._lock:
            if self.is_overrun:
                self._give_up_some(index)
                return
            self._drain()
            if self._earlier is None:
                self._earlier = PageSet(self._size)
            self._earlier.add_numbers(self._harvested)
            self._harvested.clear()

    def _give_up_some(self, index: int) -> None:
        """Of a ring that is full for certain: one that was full when the vCPU came out may not be since a reset."""
        if self._resets_seen.get(index) == self._resets:
            self._rings[index].give_up_some()
            self._reset_once()
        self._resets_seen[index] = self._resets

    def _collect_guest(self, sets: Sequence[PageSet]) -> None:
        numbers, earlier = self._take()
        for pages in sets:
            if self.is_overrun:
                pages.add(0, self._size)
                continue
            pages.add_numbers(numbers)
            if earlier is not None:
                pages.update(earlier)

    def _take(self) -> tuple[list[int], PageSet | None]:
        """What was written since the last call: page numbers, some of them more than once, and a set."""
        with self._lock:
            if not self.is_overrun:
                self._drain()
            taken = self._harvested, self._earlier
            self._harvested, self._earlier = [], None
            return taken

    def _drain(self) -> None:
        """Whatever this raises, what was harvested until then is not forgotten."""
        full = False
        for ring in self._rings:
            before = len(self._harvested)
            try:
                full |= ring.harvest(self._harvested) == ring.entries
            finally:
                self._to_reset += len(self._harvested) - before
        self._reset()
        if full or self._to_reset:
            self.is_overrun = True
            _log.warning("a dirty ring was overrun: all memory counts as written from now on")
            self._register(0)

    def _reset(self) -> None:
        """As many entries as were harvested; ``_to_reset`` is how many could not be."""
        tries = 0
        while self._to_reset > 0 and tries < _MOST_RESETS:
            done = self._reset_once()
            self._to_reset -= done
            tries = 0 if done else tries + 1

    def _reset_once(self) -> int:
        self._resets += 1
        return ioctl(self._vm_fd, Request.KVM_RESET_DIRTY_RINGS)
