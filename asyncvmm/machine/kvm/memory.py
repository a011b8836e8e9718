"""Guest RAM: one anonymous mapping of this process, shown to KVM as one memslot for each RAM region.

MAP_NORESERVE: a guest's memory is paid for page by page as it is touched. MADV_DONTFORK: a child that is forked must
not hold (and copy on write) the guest's pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

from asyncvmm.errors import ConfigError, MemorySizeError
from asyncvmm.machine.kvm.abi import KvmUserspaceMemoryRegion, Request
from asyncvmm.machine.kvm.fds import ioctl
from asyncvmm.x86.layout import Region

_MAP_NORESERVE = 0x4000

_COPY_BYTES = 1 << 20
"""Bytes copied in one go: the copy holds the GIL, and each fresh page of it is a fault."""

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class GuestMemory:
    """RAM regions back to back in one mapping. Guest addresses outside them are refused, never wrapped."""

    def __init__(self, regions: Sequence[Region]) -> None:
        """Reserve the address range. Raises MemorySizeError where the host refuses."""
        self.regions = tuple(regions)
        self.size = sum(region.size for region in regions)
        try:
            self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, OverflowError, ValueError) as error:
            raise MemorySizeError("guest memory", expected="a mapping of it", found=f"{error}") from None
        self._map.madvise(mmap.MADV_DONTFORK)
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def register(self, vm_fd: int) -> None:
        """Give each region to KVM as a memslot, numbered from 0. Raises KvmIoctlError."""
        offset = 0
        for slot, region in enumerate(self.regions):
            slot_record = KvmUserspaceMemoryRegion(slot, 0, region.start, region.size, self.host_address + offset)
            ioctl(vm_fd, Request.KVM_SET_USER_MEMORY_REGION, slot_record)
            offset += region.size

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to a guest physical address. Raises ConfigError where it is not all RAM."""
        start, view = self._offset(address, len(data)), memoryview(data)
        for done in range(0, len(data), _COPY_BYTES):
            piece = view[done : done + _COPY_BYTES]
            self._map[start + done : start + done + len(piece)] = piece

    def read_file(self, address: int, fd: int, size: int) -> int:
        """Read ``size`` bytes of a file straight into the guest; returns how many there were.

        Raises ConfigError where they are not all RAM, OSError for what read(2) says.
        """
        start, done = self._offset(address, size), 0
        with memoryview(self._map) as view:
            while done < size and (got := os.preadv(fd, [view[start + done : start + size]], done)):
                done += got
        return done

    def read(self, address: int, size: int) -> bytes:
        """Copy ``size`` bytes out of the guest. Raises ConfigError where they are not all RAM."""
        start = self._offset(address, size)
        return self._map[start : start + size]

    def close(self) -> None:
        """Unmap. Takes milliseconds for a large guest: not for the loop.

        The pages are given back by a call that releases the GIL, which mmap.close() does not.
        """
        _madvise(self.host_address, self.size, mmap.MADV_DONTNEED)
        self._map.close()

    def _offset(self, address: int, size: int) -> int:
        offset = 0
        for region in self.regions:
            if region.start <= address and address + size <= region.start + region.size:
                return offset + address - region.start
            offset += region.size
        raise ConfigError("guest address", expected="RAM", found=f"{address:#x}..{address + size:#x}")
