"""Saving the state of a QEMU whose vCPUs stand still: its own migration, into a pipe of ours.

Facts: docs/devel/migration.rst and migration/migration.c of QEMU 7.2. What is not obvious in them:

- ``fd:`` names a descriptor that came by ``getfd``, beside the command. QEMU closes it when it is done, whatever came
  of it: the end of the pipe is the end of the migration, and only then does ``cont`` work again.
- A QEMU that has saved itself does so again only after it has run: until then, what was saved holds.
- Memory shared with us is left out and copied here, from the same memfd. A restored machine's is not shared, comes
  through the pipe, and is taken out there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import anyio.to_thread

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.qemu.command import RAM
from asyncvmm.machine.qemu.control import QmpRefused
from asyncvmm.machine.qemu.guest_memory import GuestMemory
from asyncvmm.machine.qemu.migration_stream import MOST_BYTES, RamFilter
from asyncvmm.machine.waiting import in_thread, wait_out

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncvmm.snapshot.memory_writer import MemoryWriter

IGNORE_SHARED: Final = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}
"""For migrate-set-capabilities, the same at both ends."""

_UNLIMITED: Final = {"max-bandwidth": 1 << 40}
_PIPE: Final = "state"
_PIPE_BYTES: Final = 1 << 20
_UNDER_WAY: Final = frozenset({"none", "setup", "active", "device", "cancelling", "pre-switchover"})
_LOOK_S: Final = 0.002
_LOOKS: Final = 1000


class Execute(Protocol):
    """QmpControl.execute."""

    async def __call__(
        self, name: str, arguments: Mapping[str, Any] | None = None, *, descriptor: int | None = None
    ) -> Any:
        """Run a command; raises MachineError."""


class StateSaver:
    """Saves one QEMU with that ``memory``, any number of times. ``execute`` runs a QMP command."""

    def __init__(self, execute: Execute, memory: GuestMemory) -> None:
        self._execute = execute
        self._memory = memory
        self._state: bytes | None = None
        self._cancelled = False

    def forget(self) -> None:
        """The vCPUs are let run: what was saved holds no more."""
        self._state = None

    async def save(self, writer: MemoryWriter) -> bytes:
        """QEMU's state; memory goes to ``writer``. A cancellation is heard once QEMU can run on.

        Raises SnapshotFailed, MachineError.
        """
        self._cancelled = False
        task = asyncio.ensure_future(self._save(writer))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            self._cancelled = True
            await wait_out(task)
            task.exception()  # counts as seen: whoever cancelled does not want to know
            raise
        return task.result()

    async def _save(self, writer: MemoryWriter) -> bytes:
        if self._state is None:
            self._state = await self._migrate(writer)
        elif not self._memory.shared:
            raise SnapshotFailed("snapshot", expected="a machine that ran since the last", found="one held since then")
        if self._memory.shared:
            await in_thread(lambda: self._memory.copy_to(writer, self._proceed))
        return self._state

    def _proceed(self) -> None:
        if self._cancelled:
            raise _Cancelled("snapshot", expected="nobody to cancel it", found="a cancellation")

    async def _migrate(self, writer: MemoryWriter) -> bytes:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
                await self._start(write_end)
            finally:
                os.close(write_end)
            ram = RamFilter(RAM, self._memory.size, writer.write)
            failure = await in_thread(lambda: self._drain(read_end, ram))
        finally:
            os.close(read_end)
        await self._finished()
        if failure is not None:
            raise failure
        return ram.finish()

    async def _start(self, descriptor: int) -> None:
        try:
            await self._execute("migrate-set-capabilities", IGNORE_SHARED)
            await self._execute("migrate-set-parameters", _UNLIMITED)
            await self._execute("getfd", {"fdname": _PIPE}, descriptor=descriptor)
            try:
                await self._execute("migrate", {"uri": f"fd:{_PIPE}"})
            except QmpRefused:
                await self._execute("closefd", {"fdname": _PIPE})
                raise
        except QmpRefused as error:
            raise SnapshotFailed("QEMU's state", expected="a machine that can be saved", found=error.found) from error

    def _drain(self, pipe: int, ram: RamFilter) -> SnapshotFailed | None:
        """To the end, whatever happens: a QEMU cut off would not save itself again before it has run."""
        failure, left = None, 2 * (self._memory.size + MOST_BYTES)
        while left > 0 and (data := os.read(pipe, _PIPE_BYTES)):
            left -= len(data)
            try:
                if failure is None:
                    self._proceed()
                    ram.feed(data)
            except SnapshotFailed as error:
                failure = error
        return failure

    async def _finished(self) -> None:
        """The pipe has ended: hear how. Raises SnapshotFailed, MachineError."""
        for _ in range(_LOOKS):
            found = await self._execute("query-migrate")
            status = found.get("status", "none")
            if status == "completed":
                return
            if status not in _UNDER_WAY:
                break
            await anyio.sleep(_LOOK_S)
        words = found.get("error-desc", status)
        raise SnapshotFailed("QEMU's state", expected="a machine that can be saved", found=words)


class _Cancelled(SnapshotFailed):
    """Nobody waits for it any more."""
