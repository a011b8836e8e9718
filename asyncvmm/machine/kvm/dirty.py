"""What was written to a guest's memory: by the guest, which KVM logs, and by the host, which only the host knows.

KVM's dirty log (KVM API, KVM_GET_DIRTY_LOG) costs a guest a fault for the first write to each page since the log was
last read; it is on only while somebody wants to know. It does not see what this process writes, nor pages that are
given back: ``HostWrites`` is told of those.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

from asyncvmm.machine.kvm.abi import KVM_MEM_LOG_DIRTY_PAGES, KvmDirtyLog, KvmUserspaceMemoryRegion, Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.machine.kvm.pages import PageSet
from asyncvmm.snapshot.memory_map import PAGE_BYTES
from asyncvmm.x86.layout import Region

_WORD_BITS = 64


class HostWrites:
    """The pages that the host wrote to, while it is on."""

    def __init__(self, size: int) -> None:
        self.is_on = False
        self._size = size
        self._lock = threading.Lock()
        self._pages = PageSet(0)
        self._any = False

    def begin(self) -> None:
        """Listen from now on."""
        with self._lock:
            if not self.is_on:
                self._pages, self._any, self.is_on = PageSet(self._size), False, True

    def end(self) -> None:
        """Forget all and listen no more."""
        with self._lock:
            self._pages, self._any, self.is_on = PageSet(0), False, False

    def add(self, offset: int, size: int) -> None:
        """These bytes were written. On any thread."""
        if self.is_on:
            with self._lock:
                if self.is_on:
                    self._pages.add(offset, size)
                    self._any = True

    def take(self) -> PageSet:
        """What was written since the last call; that it was nothing is known without a look at each page."""
        with self._lock:
            if not self._any:
                return PageSet(0)
            taken = self._pages
            self._pages, self._any = PageSet(self._size if self.is_on else 0), False
            return taken


class DirtyLog:
    """Who writes to the memory of one VM, from ``begin`` to ``end``. Blocking, one thread at a time.

    regions, host_address: RAM as it is registered with KVM, memslots from 0. is_on: they were registered with the log.
    """

    def __init__(
        self, vm_fd: int, regions: Sequence[Region], host_address: int, host: HostWrites, *, is_on: bool = False
    ) -> None:
        self._vm_fd = vm_fd
        self._regions = regions
        self._host_address = host_address
        self._host = host
        self.is_on = is_on
        if is_on:
            host.begin()

    def begin(self) -> None:
        """Log from now on. Raises KvmIoctlError."""
        if not self.is_on:
            self._host.begin()
            self._register(KVM_MEM_LOG_DIRTY_PAGES)
            self.is_on = True

    def end(self) -> None:
        """Log no more. Raises KvmIoctlError."""
        if self.is_on:
            self._register(0)
            self._host.end()
            self.is_on = False

    def collect(self, sets: Sequence[PageSet]) -> None:
        """Add what was written since the last call to each set. Raises HostError; nothing is forgotten then."""
        self._collect_guest(sets)
        host = self._host.take()
        for pages in sets:
            pages.update(host)

    def _collect_guest(self, sets: Sequence[PageSet]) -> None:
        offset = 0
        for slot, region in enumerate(self._regions):
            bitmap = self._bitmap(slot, region.size)
            for pages in sets:
                pages.add_bits(bitmap, offset, region.size)
            offset += region.size

    def _bitmap(self, slot: int, size: int) -> bytearray:
        words = -(-(size // PAGE_BYTES) // _WORD_BITS)
        bitmap = bytearray(8 * words)
        buffer = (ctypes.c_char * len(bitmap)).from_buffer(bitmap)
        ioctl(self._vm_fd, Request.KVM_GET_DIRTY_LOG, KvmDirtyLog(slot, 0, ctypes.addressof(buffer)))
        return bitmap

    def _register(self, flags: int) -> None:
        address = self._host_address
        for slot, region in enumerate(self._regions):
            record = KvmUserspaceMemoryRegion(slot, flags, region.start, region.size, address)
            ioctl(self._vm_fd, Request.KVM_SET_USER_MEMORY_REGION, record)
            address += region.size
