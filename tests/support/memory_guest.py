"""The guest memory.S at the other end of its serial port, and what is saved of it, as files and as bytes."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.discard import GuestDiscard
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.machine.waiting import in_thread
from asyncvmm.snapshot.memory_writer import MemoryWriter
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.restoring import Shell
    from asyncvmm.snapshot.memory_map import MemoryMap
    from asyncvmm.snapshot.memory_map import Run as Place
    from tests.kvm.conftest import Run

PAGE = 4096
OWN_PAGES = 512
"""The guest itself is below that page."""
PLACE = 0x11
"""Where in a page ``store`` puts its byte."""

SMALLEST_RING = 1 << 14
"""Bytes of a dirty ring that every KVM takes: 1024 entries, of which it holds some hundreds back."""


class MemoryGuest:
    """A machine that runs it; a restored one may have to be resumed first."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.machine = run.machine

    async def ready(self) -> None:
        """Wait for its first word."""
        await self.run.said(b">")

    async def _ask(self, command: bytes, size: int = 1) -> bytes:
        heard = len(self.run.output)
        await self.machine.write("console", command)
        await self.run.until(lambda: len(self.run.output) >= heard + size)
        assert len(self.run.output) == heard + size
        return self.run.output[heard:]

    async def store(self, page: int, value: int) -> None:
        """Write a byte of a page."""
        assert await self._ask(struct.pack("<cIB", b"w", page, value)) == b"k"

    async def load(self, page: int) -> int:
        """Read it."""
        return (await self._ask(struct.pack("<cI", b"r", page)))[0]

    async def fill(self, page: int, count: int, value: int) -> None:
        """Write pages."""
        assert await self._ask(struct.pack("<cIIB", b"f", page, count, value)) == b"k"

    async def sum(self, page: int, count: int) -> int:
        """Add up the 64-bit words of pages."""
        return int.from_bytes(await self._ask(struct.pack("<cII", b"c", page, count), 8), "little")

    async def count(self) -> int:
        """Count one further; from 1 on."""
        return (await self._ask(b"x"))[0]

    async def begin_dirtying(self, page: int, count: int, pages_per_s: int) -> None:
        """Write to one page after the other until ``end_dirtying``."""
        vm = self.machine._vm
        assert vm is not None
        pace = vm.tsc_khz * 1000 // pages_per_s // 1024
        await self.machine.write("console", struct.pack("<cIII", b"d", page, count, pace))

    async def end_dirtying(self) -> None:
        """See there."""
        assert await self._ask(b"!") == b"k"

    @property
    def view(self) -> memoryview:
        """Its memory, in place."""
        vm = self.machine._vm
        assert vm is not None
        return vm.memory.view

    def memory(self) -> bytes:
        """All of it, copied."""
        return bytes(self.view)


@attrs.define
class Save:
    """A machine that was saved, and the files that its memory is in, the full one first."""

    machine: SavedMachine
    fds: tuple[int, ...]
    maps: tuple[MemoryMap, ...]

    def plan(
        self,
        *,
        track_dirty: bool = False,
        ring_bytes: int | None = None,
        touched: Sequence[Place] = (),
        written: Sequence[Place] = (),
    ) -> RestorePlan:
        """To restore it."""
        return RestorePlan(
            saved=self.machine,
            layers=tuple(MemoryLayer(fd=fd, map=found) for fd, found in zip(self.fds, self.maps, strict=True)),
            track_dirty=track_dirty,
            ring_bytes=ring_bytes,
            touched=tuple(touched),
            written=tuple(written),
        )

    def memory(self) -> bytes:
        """What the files say, one laid over the other."""
        memory = bytearray(self.machine.memory.size)
        for fd, found in zip(self.fds, self.maps, strict=True):
            for offset, size in found.zero:
                memory[offset : offset + size] = bytes(size)
            for offset, size in found.data:
                memory[offset : offset + size] = os.pread(fd, size, offset)
        return bytes(memory)

    async def is_memory_of(self, guest: MemoryGuest) -> bool:
        """Whether a machine that stands still has just that in its memory. It takes a while, hence a thread."""
        return await in_thread(lambda: self.memory() == guest.memory())

    @property
    def allocated(self) -> int:
        """Bytes of disk that the newest file takes."""
        return os.fstat(self.fds[-1]).st_blocks * 512


def discard_of(guest: MemoryGuest) -> GuestDiscard:
    """As a balloon has it."""
    vm = guest.machine._vm
    assert vm is not None
    memory = vm.memory
    return GuestDiscard(memory.regions, memory.host_address, memory.backing, on_discard=memory.mark)


class FullFile(MemoryWriter):
    """A memory file with room for ``room`` bytes of data. Zeros take none, and how pages lie together does not matter:
    where the host uses huge pages, all of a small guest is one run."""

    room = 0

    def write_runs(self, memory: memoryview, runs: Iterable[Place]) -> None:
        for offset, size in runs:
            for page in range(offset, offset + size, PAGE):
                if self.bytes_written >= self.room:
                    raise SnapshotFailed("memory file", expected="room for it", found="none left")
                super().write_runs(memory, [(page, PAGE)])


class Files:
    """Memory files without names, all closed by ``close``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fds: list[int] = []

    def writer(self, size: int, *, difference: bool = False) -> MemoryWriter:
        """One for a new file."""
        with tempfile.TemporaryFile(dir=self._directory) as file:
            self._fds.append(os.dup(file.fileno()))
        return MemoryWriter(self._fds[-1], size, is_difference=difference)

    async def save(self, guest: MemoryGuest, base: Save | None = None, name: str | None = None) -> Save:
        """Save a paused machine, as a difference of ``base``, whose name is ``name``, or whole."""
        writer = self.writer(len(guest.view), difference=base is not None)
        return self.saved(await guest.machine.save(writer, difference_of=name), base)

    def saved(self, machine: SavedMachine, base: Save | None = None) -> Save:
        """What was written to the newest file."""
        fds, maps = (base.fds, base.maps) if base else ((), ())
        return Save(machine, (*fds, self._fds[-1]), (*maps, machine.memory))

    def close(self) -> None:
        """All files are gone."""
        while self._fds:
            os.close(self._fds.pop())


New = Callable[..., MemoryGuest]
"""``new_guest`` for the program that runs, with its options."""


def new_guest(
    kernel: Path,
    *,
    memory_mib: int = 16,
    vcpus: int = 1,
    track_dirty: bool = False,
    ring_bytes: int | None = None,
    name: str = "kvmtest",
    timeline: Timeline | None = None,
) -> MemoryGuest:
    """A machine that is neither started nor restored."""
    from tests.kvm.conftest import Run

    run = Run()
    plan = BootPlan(
        name=name,
        memory_mib=memory_mib,
        vcpus=vcpus,
        kernel=kernel,
        initrd=None,
        track_dirty=track_dirty,
        ring_bytes=ring_bytes,
    )
    run.machine = KvmMachine(plan, timeline or Timeline(), run.take)
    return MemoryGuest(run)


@asynccontextmanager
async def booted(guest: MemoryGuest) -> AsyncIterator[MemoryGuest]:
    """For a block of code."""
    try:
        await guest.machine.start()
        await guest.ready()
        yield guest
    finally:
        await guest.machine.stop()


@asynccontextmanager
async def restored(guest: MemoryGuest, plan: RestorePlan, shell: Shell | None = None) -> AsyncIterator[MemoryGuest]:
    """For a block of code, still held."""
    try:
        await guest.machine.restore(plan, shell=shell)
        yield guest
    finally:
        await guest.machine.stop()
