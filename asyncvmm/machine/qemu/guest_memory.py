"""GuestMemory: the file that is a QEMU's RAM, and who may write to it.

- A machine that is booted has a memfd, shared with us: its pages are copied from there into a snapshot. It cannot
  shrink, so nobody who maps it can be killed by that.
- A restored one has the snapshot's memory file itself, mapped private: nothing is copied, and all clones share its
  pages. QEMU 7.2 knows no other way to map a file private than to open it for writing. So what gives memory back, the
  balloon, would punch holes into the snapshot (ram_block_discard_range in softmmu/physmem.c): with one, and for a file
  that may only be read, memory is copied into a memfd.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from asyncvmm.errors import MachineError, SnapshotDamaged
from asyncvmm.machine.saved import MemoryLayer
from asyncvmm.snapshot.memory_map import Run

if TYPE_CHECKING:
    from asyncvmm.snapshot.memory_writer import MemoryWriter

_PIECE = 1 << 22
"""Bytes copied between two looks at whether to go on."""

# linux/fcntl.h
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4


class GuestMemory:
    """``size`` bytes in ``fd``, which is this record's. ``shared``: whether what the guest writes goes into it."""

    def __init__(self, fd: int, size: int, *, shared: bool) -> None:
        self.fd = fd
        self.size = size
        self.shared = shared

    @classmethod
    def new(cls, size: int) -> GuestMemory:
        """Empty memory. Raises MachineError."""
        try:
            fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _no_memory(error) from error
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
        except OSError as error:
            os.close(fd)
            raise _no_memory(error) from error
        return cls(fd, size, shared=True)

    @classmethod
    def of_snapshot(cls, layer: MemoryLayer, size: int, *, gives_back: bool) -> GuestMemory:
        """A snapshot's memory. ``gives_back``: the guest has a balloon. Blocks if that has to be copied.

        Raises SnapshotDamaged, MachineError.
        """
        found = os.fstat(layer.fd).st_size
        if found < size or layer.map.size != size or layer.map.is_difference:  # a trailer may stand behind it
            kind = "a difference, " if layer.map.is_difference else ""
            raise SnapshotDamaged("memory file", expected=f"{size} bytes", found=f"{kind}{found} bytes")
        if not gives_back and os.access(f"/proc/self/fd/{layer.fd}", os.R_OK | os.W_OK):
            return cls(os.dup(layer.fd), size, shared=False)
        memory = cls.new(size)
        try:
            for run in layer.map.data:
                _copy(layer.fd, memory.fd, run)
        except BaseException as error:
            memory.close()
            if isinstance(error, OSError):
                raise _no_memory(error) from error
            raise
        return memory

    def copy_to(self, writer: MemoryWriter, proceed: Callable[[], None]) -> None:
        """Copy shared memory as it is now, without its holes. Blocking; ``proceed`` raises what is to end it.

        Raises SnapshotFailed, MachineError.
        """
        try:
            fd = os.dup(self.fd)  # QEMU may end meanwhile, and ``close`` be called
        except OSError as error:
            raise MachineError("guest memory", expected="that of a running QEMU", found=error.strerror) from error
        try:
            with mmap.mmap(fd, self.size, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
                for at, size in _pieces(fd, self.size):
                    proceed()
                    with view[at : at + size] as piece:
                        writer.write(at, piece)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of it. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _pieces(fd: int, size: int) -> Iterator[Run]:
    """What is there of a sparse file, a piece at a time."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no more data
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield from ((at, min(_PIECE, end - at)) for at in range(start, end, _PIECE))


def _copy(source: int, target: int, run: Run) -> None:
    offset, size = run
    os.lseek(target, offset, os.SEEK_SET)
    end = offset + size
    while offset < end:
        sent = os.sendfile(target, source, offset, min(end - offset, _PIECE))
        if not sent:
            raise SnapshotDamaged("memory file", expected=f"{end} bytes", found=f"{offset}")
        offset += sent


def _no_memory(error: OSError) -> MachineError:
    failure = MachineError("guest memory", expected="memory for it", found=error.strerror)
    failure.retryable = True
    return failure
