"""Saving a KVM machine: device, board and vCPU state as sections, memory to the snapshot's file.

On the loop. What blocks runs in a worker thread, one call at a time; a cancelled one ends at its next piece of memory
and is waited for, so that neither the file nor the guest's memory goes away under it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from asyncvmm.errors import HostError, StateError
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.memory_saver import MemorySaver
from asyncvmm.machine.kvm.platform import Board
from asyncvmm.machine.kvm.state.cpu_check import cpu_facts
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.machine import save_sections
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.saved import SavedMachine
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.machine.waiting import wait_out
from asyncvmm.snapshot.codec import encode

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.building import Building
    from asyncvmm.machine.kvm.devices import DeviceSet
    from asyncvmm.snapshot.memory_writer import MemoryWriter

_log = logging.getLogger("asyncvmm.machine")

T = TypeVar("T")


def saving_of(made: Building, devices: DeviceSet | None) -> Saving:
    """For a machine that was made. Blocks: what saves must know of the host is asked here, once a process.

    Raises StateError if it is gone meanwhile, HostError.
    """
    if made.vm is None or made.board is None or made.log is None:
        raise _gone()
    host_state()
    memory = MemorySaver(made.vm.memory, made.log, tracked=made.tracked, held=made.held)
    return Saving(made.vm, made.board, devices, memory)


class Saving:
    """Saves of one running machine, one at a time."""

    def __init__(self, vm: KvmVm, board: Board, devices: DeviceSet | None, memory: MemorySaver) -> None:
        self._vm = vm
        self._board = board
        self._devices = devices
        self._memory = memory
        self._stop = threading.Event()
        self._calls: set[asyncio.Future[Any]] = set()
        self._settling: asyncio.Task[None] | None = None
        self._closed = False
        self.busy = False
        """Whether a save is under way, or what is done ahead of one."""

    async def precopy(self, writer: MemoryWriter) -> None:
        """See Machine."""
        with self._alone():
            await self._settled()
            try:
                await self._in_thread(lambda: self._memory.precopy(writer, self._proceed))
            except BaseException:
                self.settle_soon()
                await self._settled()
                raise

    async def save(self, writer: MemoryWriter, difference_of: str | None) -> SavedMachine:
        """See Machine. No vCPU may run until it has returned."""
        with self._alone():
            await self._settled()
            sections = {}
            if self._devices is not None:
                sections["devices"] = encode(await self._devices.state())
            return await self._in_thread(lambda: self._save(writer, difference_of, sections))

    def saved_as(self, name: str) -> None:
        """See Machine."""
        self._memory.saved_as(name)

    def settle_soon(self) -> None:
        """The vCPUs run again: stop what only a save wanted, beside what the loop does. Nobody waits for it: who lets
        a guest run must not be cancelled half-way."""
        if not (self._closed or self._memory.is_settled or self._settling is not None):
            self._settling = asyncio.ensure_future(self._settle())

    async def _settle(self) -> None:
        try:
            with suppress(StateError):  # it is being stopped
                await self._in_thread(self._memory.settle)
        except HostError as error:  # the guest runs on, if slower than it might
            _log.warning("the dirty log is still on: %s", error)
        finally:
            self._settling = None

    async def _settled(self) -> None:
        if self._settling is not None:
            await wait_out(self._settling)

    async def look(self, function: Callable[[GuestMemory], T]) -> T:
        """Have a thread look at memory, which stays where it is for as long as that takes."""
        return await self._in_thread(lambda: function(self._vm.memory))

    async def aclose(self) -> None:
        """Nothing is saved any more; what is under way ends."""
        self._closed = True
        self._stop.set()
        while self._calls:  # taken out here: one that is done waits for its own caller to do so, who waits for the loop
            await wait_out(self._calls.pop())
        await self._settled()

    # -- on a worker thread --------------------------------------------------------------------------------------------

    def _save(self, writer: MemoryWriter, difference_of: str | None, sections: Mapping[str, bytes]) -> SavedMachine:
        vm = self._vm
        states = save_sections(vm.fd, [vcpu.fd for vcpu in vm.vcpus], self._board)
        self._memory.save(writer, difference_of, self._proceed)
        return SavedMachine(
            accel="kvm",
            vcpus=len(vm.vcpus),
            regions=tuple((region.start, region.size) for region in vm.memory.regions),
            sections={**sections, **states},
            cpu=cpu_facts(vm.tsc_khz),
            memory=writer.map(),
        )

    def _proceed(self) -> None:
        if self._stop.is_set():
            raise _gone()

    # -- calling it ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.busy:
            raise StateError("save", expected="one at a time", found="one under way")
        self.busy, self._stop = True, threading.Event()
        try:
            yield
        finally:
            self.busy = False

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Cancelled, it is told so, and waited for."""
        if self._closed:
            raise _gone()
        call = asyncio.ensure_future(run_in_thread(function))
        self._calls.add(call)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            self._stop.set()
            await wait_out(call)
            raise
        finally:
            self._calls.discard(call)
            if call.done() and not call.cancelled():
                call.exception()  # counts as seen


def _gone() -> StateError:
    return StateError("save", expected="a machine that nobody stops meanwhile", state="closed")
