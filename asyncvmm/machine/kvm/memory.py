"""Guest RAM: one anonymous mapping of this process, shown to KVM as one memslot for each RAM region.

MAP_NORESERVE: a guest's memory is paid for page by page as it is touched. MADV_DONTFORK: a child that is forked must
not hold (and copy on write) the guest's pages.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from functools import cached_property

from asyncvmm.errors import ConfigError, MemorySizeError
from asyncvmm.machine.kvm.abi import KvmUserspaceMemoryRegion, Request
from asyncvmm.machine.kvm.fastpath.chain import At, Chain, SystemCall
from asyncvmm.machine.kvm.mapped import mapped_view
from asyncvmm.x86.layout import Region

MAP_MEMORY = "mmap of guest memory"
"""The step that a host may refuse."""

_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE

_MOST_BYTES = 1 << 47
"""The address space of an x86-64 process."""

_COPY_BYTES = 1 << 20
"""Bytes copied in one go: the copy holds the GIL, and each fresh page of it is a fault."""


def map_memory(chain: Chain, regions: Sequence[Region]) -> At:
    """Append the step that reserves the address range, and give its address. Raises MemorySizeError."""
    size = sum(region.size for region in regions)
    if size > _MOST_BYTES:
        raise MemorySizeError("guest memory", expected="a mapping of it", found=f"{size} bytes")
    memory = chain.map(MAP_MEMORY, size, _MAP_FLAGS)
    chain.call("madvise", SystemCall.MADVISE, memory, size, mmap.MADV_DONTFORK)
    return memory


def register_memory(chain: Chain, vm: At, memory: At, regions: Sequence[Region]) -> None:
    """Append the steps that give each region to KVM as a memslot, numbered from 0."""
    offset = 0
    for slot, region in enumerate(regions):
        record = chain.data(KvmUserspaceMemoryRegion(slot, 0, region.start, region.size))
        chain.store(record + KvmUserspaceMemoryRegion.userspace_addr.offset, memory + offset)
        chain.ioctl(Request.KVM_SET_USER_MEMORY_REGION, vm, record)
        offset += region.size


class GuestMemory:
    """RAM regions back to back in one mapping. Guest addresses outside them are refused, never wrapped."""

    def __init__(self, regions: Sequence[Region], host_address: int) -> None:
        """The regions as they were mapped there; ``close`` comes before the unmapping."""
        self.regions = regions
        self.host_address = host_address

    @property
    def size(self) -> int:
        """Bytes of all regions."""
        return sum(region.size for region in self.regions)

    @cached_property
    def _map(self) -> memoryview:
        return mapped_view(self.host_address, self.size)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` to a guest physical address. Raises ConfigError where it is not all RAM."""
        start, view = offset_of(self.regions, address, len(data)), memoryview(data)
        for done in range(0, len(data), _COPY_BYTES):
            piece = view[done : done + _COPY_BYTES]
            self._map[start + done : start + done + len(piece)] = piece

    def read_file(self, address: int, fd: int, size: int, done: int = 0) -> int:
        """Read ``size`` bytes of a file straight into the guest, of which ``done`` are there; returns how many are.

        Raises ConfigError where they are not all RAM, OSError for what read(2) says.
        """
        start = offset_of(self.regions, address, size)
        while done < size and (got := os.preadv(fd, [self._map[start + done : start + size]], done)):
            done += got
        return done

    def read(self, address: int, size: int) -> bytes:
        """Copy ``size`` bytes out of the guest. Raises ConfigError where they are not all RAM."""
        start = offset_of(self.regions, address, size)
        return bytes(self._map[start : start + size])

    def views(self) -> list[tuple[int, memoryview]]:
        """Each region's first guest address and its bytes, in place. Not to be used after ``close``."""
        found, offset = [], 0
        for region in self.regions:
            found.append((region.start, self._map[offset : offset + region.size]))
            offset += region.size
        return found

    def close(self) -> None:
        """Touch it no more."""
        self._map.release()


def offset_of(regions: Sequence[Region], address: int, size: int) -> int:
    """Where these guest addresses lie in the mapping. Raises ConfigError where they are not all RAM."""
    offset = 0
    for region in regions:
        if region.start <= address and address + size <= region.start + region.size:
            return offset + address - region.start
        offset += region.size
    raise ConfigError("guest address", expected="RAM", found=f"{address:#x}..{address + size:#x}")
