"""Guest RAM: one range of this process's addresses, shown to KVM as one memslot for each RAM region.

MAP_NORESERVE: a guest's memory is paid for page by page as it is touched. MADV_DONTFORK: a child that is forked must
not hold (and copy on write) the guest's pages. A restored guest's range has its snapshot's memory files mapped over it,
privately: clones share the pages that they only read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from asyncvmm.errors import ConfigError, MemorySizeError
from asyncvmm.machine.kvm.abi import KVM_MEM_LOG_DIRTY_PAGES, KvmUserspaceMemoryRegion, Request
from asyncvmm.machine.kvm.dirty import HostWrites
from asyncvmm.machine.kvm.fastpath.chain import Argument, At, Chain, SystemCall
from asyncvmm.machine.kvm.layers import Piece
from asyncvmm.machine.kvm.mapped import mapped_view
from asyncvmm.x86.layout import Region

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.discard import Backing

MAP_MEMORY = "mmap of guest memory"
"""The step that a host may refuse."""

MAP_SAVED = "mmap of saved memory"
READ_SAVED = "read of saved memory"
"""Steps that a memory file may fail."""

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE

_MOST_BYTES = 1 << 47
"""The address space of an x86-64 process."""

_COPY_BYTES = 1 << 20
"""Bytes copied in one go: the copy holds the GIL, and each fresh page of it is a fault."""

_READ_BYTES = 1 << 30


class _Zeros(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * (1 << 16))]


def map_memory(chain: Chain, regions: Sequence[Region]) -> At:
    """Append the step that reserves the address range, and give its address. Raises MemorySizeError."""
    size = sum(region.size for region in regions)
    if size > _MOST_BYTES:
        raise MemorySizeError("guest memory", expected="a mapping of it", found=f"{size} bytes")
    memory = chain.map(MAP_MEMORY, size, _MAP_FLAGS)
    chain.call("madvise", SystemCall.MADVISE, memory, size, mmap.MADV_DONTFORK)
    return memory


def map_saved(chain: Chain, memory: At, pieces: Sequence[Piece], fds: Sequence[Argument]) -> None:
    """Append the steps that put a snapshot's pages over fresh memory. ``fds`` are its layers' descriptors."""
    for piece in pieces:
        place = memory + piece.offset
        if not piece.is_copied:
            _map_piece(chain, place, piece, fds)
        elif piece.layer is None:
            _clear(chain, place, piece.size)
        else:
            _read(chain, place, piece, fds[piece.layer])


def _map_piece(chain: Chain, place: At, piece: Piece, fds: Sequence[Argument]) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if piece.layer is None:
        where: tuple[Argument, ...] = (_MAP_FLAGS | _MAP_FIXED, -1, 0)
    else:
        where = (mmap.MAP_PRIVATE | _MAP_NORESERVE | _MAP_FIXED, fds[piece.layer], piece.offset)
    chain.call(MAP_SAVED, SystemCall.MMAP, place, piece.size, protection, *where)
    chain.call("madvise", SystemCall.MADVISE, place, piece.size, mmap.MADV_DONTFORK)


def _read(chain: Chain, place: At, piece: Piece, fd: Argument) -> None:
    """In parts that a read(2) of a regular file does not divide further."""
    for done in range(0, piece.size, _READ_BYTES):
        size = min(_READ_BYTES, piece.size - done)
        chain.call(READ_SAVED, SystemCall.PREAD64, fd, place + done, size, piece.offset + done, least=size)


def _clear(chain: Chain, place: At, size: int) -> None:
    zeros = chain.shared(_Zeros())
    for done in range(0, size, ctypes.sizeof(_Zeros)):
        chain.copy(place + done, zeros, min(ctypes.sizeof(_Zeros), size - done))


def register_memory(chain: Chain, vm: At, memory: At, regions: Sequence[Region], *, track_dirty: bool = False) -> None:
    """Append the steps that give each region to KVM as a memslot, numbered from 0, with a dirty log or without."""
    offset, flags = 0, KVM_MEM_LOG_DIRTY_PAGES if track_dirty else 0
    for slot, region in enumerate(regions):
        record = chain.data(KvmUserspaceMemoryRegion(slot, flags, region.start, region.size))
        chain.store(record + KvmUserspaceMemoryRegion.userspace_addr.offset, memory + offset)
        chain.ioctl(Request.KVM_SET_USER_MEMORY_REGION, vm, record)
        offset += region.size


class GuestMemory:
    """RAM regions back to back in one mapping. Guest addresses outside them are refused, never wrapped."""

    def __init__(self, regions: Sequence[Region], host_address: int, backing: Backing = "anonymous") -> None:
        """The regions as they were mapped there; ``close`` comes before the unmapping."""
        self.regions = regions
        self.host_address = host_address
        self.backing: Backing = backing
        self.host_writes = HostWrites(self.size)

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
        self.host_writes.add(start, len(data))

    def mark(self, address: int, size: int) -> None:
        """Say that the host has written there, or given pages back; KVM's dirty log does not see it. On any thread.

        Raises ConfigError where it is not all RAM.
        """
        if self.host_writes.is_on:
            self.host_writes.add(offset_of(self.regions, address, size), size)

    def read_file(self, address: int, fd: int, size: int, done: int = 0) -> int:
        """Read ``size`` bytes of a file straight into the guest, of which ``done`` are there; returns how many are.

        Raises ConfigError where they are not all RAM, OSError for what read(2) says.
        """
        start = offset_of(self.regions, address, size)
        while done < size and (got := os.preadv(fd, [self._map[start + done : start + size]], done)):
            done += got
        self.host_writes.add(start, size)
        return done

    def read(self, address: int, size: int) -> bytes:
        """Copy ``size`` bytes out of the guest. Raises ConfigError where they are not all RAM."""
        start = offset_of(self.regions, address, size)
        return bytes(self._map[start : start + size])

    @property
    def view(self) -> memoryview:
        """All of it, back to back, as in a snapshot's memory file. Not to be used after ``close``."""
        return self._map

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
