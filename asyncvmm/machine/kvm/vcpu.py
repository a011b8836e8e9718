"""One vCPU: its descriptor, its kvm_run page, and the thread that runs it.

The thread loops over KVM_RUN. It is told what to do by ``_order`` and made to look by a *kick*: kvm_run.immediate_exit
is set, so that the next KVM_RUN returns at once, and a signal is sent, so that a running one returns too. The signal is
blocked in the thread and unblocked only inside KVM_RUN (KVM_SET_SIGNAL_MASK); it stays pending, no handler ever runs,
and the thread takes it with sigtimedwait. A KVM_RUN that ends so has completed any access that was half done, which is
why a vCPU is paused there and nowhere else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Literal, Protocol

import attrs

from asyncvmm.bus import Bus
from asyncvmm.effects import Stopped, StopReason
from asyncvmm.errors import KvmIoctlError
from asyncvmm.machine.kvm.abi import KvmRegs, KvmSignalMask, Request
from asyncvmm.machine.kvm.dispatch import Dispatcher, needs_stop
from asyncvmm.machine.kvm.exits import (
    EXIT_REASON_WORD,
    IMMEDIATE_EXIT,
    IO_COUNT_WORD,
    IO_KEY_WORD,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_IO,
    Exit,
    FailEntryExit,
    InternalErrorExit,
    OtherExit,
    ShutdownExit,
    decode,
    exit_name,
)
from asyncvmm.machine.kvm.fastpath.binding import Fastpath
from asyncvmm.machine.kvm.faults import NO_FAULTS, Faults, faults_of, thread_faults
from asyncvmm.machine.kvm.fds import ioctl, raw_ioctl
from asyncvmm.machine.kvm.mapped import mapped_view
from asyncvmm.machine.kvm.statistics import VcpuCounters
from asyncvmm.machine.threads import start_thread

KICK_SIGNAL = signal.SIGRTMIN + 6
_KERNEL_SIGSET_BYTES = 8
_RING_FULL = OtherExit(KVM_EXIT_DIRTY_RING_FULL)
_TRANSIENT = (errno.EINTR, errno.EAGAIN)

Order = Literal["run", "pause", "stop"]
Halt = Callable[[Stopped], None]
FirstExit = Callable[[int, int, Faults], None]
"""Is told on the vCPU's thread when it entered the guest first, when it came out with an exit, CLOCK_MONOTONIC ns, and
the page faults in between."""


@attrs.frozen
class FirstRun:
    """How a guest that was entered ahead came out: KVM_RUN's result, 0 or -errno; CLOCK_MONOTONIC ns; the thread's page
    faults in between."""

    result: int
    entered_ns: int
    left_ns: int
    faults: Faults


class VcpuThread(Protocol):
    """What a vCPU runs on: a Thread, or a Launch."""

    @property
    def native_id(self) -> int | None:
        """Its number in the kernel."""

    def join(self) -> None:
        """Wait until it is done with the vCPU."""


class Vcpu:
    """A created vCPU. ``start`` or ``adopt`` gives it its thread; ``order`` steers it; ``close`` ends it once the
    thread ended."""

    on_ring_full: Callable[[], None] | None = None
    """Of a VM with dirty rings: makes room in them, on the vCPU's thread."""

    def __init__(self, index: int, fd: int, run_address: int, run_size: int) -> None:
        """A vCPU that was made: its descriptor, and its kvm_run page as it was mapped."""
        self.index = index
        self.fd = fd
        self._run_address = run_address
        self._run_size = run_size
        self._fastpath: Fastpath | None = None
        self.counters = VcpuCounters()
        self.trace: Callable[[int, int, Exit], None] | None = None
        self.on_first_exit: FirstExit | None = None
        self._order: Order = "run"
        self._changed = threading.Condition()
        self._parked = False
        self._kickable: int | None = None
        self._kicked = False
        self._thread: VcpuThread | None = None
        self._faults_before = NO_FAULTS
        self._faults_in_all: Faults | None = None

    @cached_property
    def run(self) -> memoryview:
        """The kvm_run page. Made when it is first used, as is ``_words``: it is not needed to enter the guest."""
        return mapped_view(self._run_address, self._run_size)

    @cached_property
    def _words(self) -> memoryview:
        return self.run.cast("I")

    # Calls from the loop, or from a worker thread on its behalf.

    def start(
        self,
        name: str,
        bus: Bus,
        halt: Halt,
        fastpath: Fastpath | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Start the thread. ``halt`` is told, on that thread, of an exit the guest cannot run on after.

        With ``fastpath`` the native run loop answers what it can, except while exits are traced. Waits until the
        thread was begun, some 0.1 ms: not for the loop. Raises HostError where no thread is to be had.
        """
        dispatcher = Dispatcher(bus, self.run, self.counters, clock)
        self._fastpath = fastpath
        main = (dispatcher, halt, clock)
        thread = threading.Thread(target=self._main, args=main, name=name, daemon=True)
        start_thread(thread)
        self._thread = thread

    def adopt(
        self,
        thread: VcpuThread,
        ident: int,
        faults: Faults,
        bus: Bus,
        halt: Halt,
        fastpath: Fastpath | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> Callable[[FirstRun | None], None]:
        """Be run by a thread that is there: it calls what this gives, with how its first run of the guest ended, None
        if it did not enter it. ``ident``: where it is kicked; it has blocked the signal. ``faults``: its own so far."""
        dispatcher = Dispatcher(bus, self.run, self.counters, clock)
        self._fastpath, self._thread, self._kickable, self._faults_before = fastpath, thread, ident, faults

        def serve(first: FirstRun | None) -> None:
            begin = None if first is None else lambda: self._go_on(first, dispatcher, clock)
            self._serve(dispatcher, halt, clock, begin)

        return serve

    def order(self, order: Order) -> None:
        """Say what the vCPU shall do, and make it look. Returns at once."""
        with self._changed:
            if self._order == "stop":
                return
            self._order = order
            self._changed.notify_all()
        if order != "run":
            self.kick()

    def kick(self) -> None:
        """Make a running or coming KVM_RUN return.

        The thread says itself from when to when it may be signalled: before it has blocked the signal, one would kill
        the process, and after its end there is nobody to signal. One signal at a time: they would queue up.
        """
        with self._changed:
            if self._kickable is not None and not self._kicked:
                self._kicked = True
                self.run[IMMEDIATE_EXIT] = 1
                signal.pthread_kill(self._kickable, KICK_SIGNAL)

    def wait_parked(self, timeout_s: float) -> bool:
        """Wait until the vCPU is paused or its thread ended. Blocks: not for the loop."""
        with self._changed:
            return self._changed.wait_for(self._is_parked, timeout_s)

    def join(self) -> None:
        """Wait until the thread ended, which was ordered to stop. Blocks: not for the loop."""
        if self._thread is not None:
            self._thread.join()

    def regs(self) -> KvmRegs:
        """KVM_GET_REGS; of a parked vCPU only. Raises KvmIoctlError."""
        regs = KvmRegs()
        ioctl(self.fd, Request.KVM_GET_REGS, regs)
        return regs

    def faults(self) -> Faults:
        """Page faults of its thread so far, Python's own among them; once it has ended, those until then."""
        native_id = None if self._thread is None else self._thread.native_id
        so_far = NO_FAULTS if native_id is None else faults_of(native_id) - self._faults_before
        # Looked at last: a thread that it was adopted by may be another vCPU's by now.
        in_all = self._faults_in_all
        return so_far if in_all is None else in_all

    def tell_it_was_held(self) -> None:
        """KVM_KVMCLOCK_CTRL: time has gone by in which it could do nothing, so that a guest's watchdogs need not bark.

        Of a parked vCPU only.
        """
        with suppress(KvmIoctlError):  # EINVAL: a guest without kvmclock, which cannot be told
            ioctl(self.fd, Request.KVM_KVMCLOCK_CTRL)

    @property
    def last_exit(self) -> str:
        """The name of the newest exit to userspace."""
        return exit_name(self._words[EXIT_REASON_WORD]) if self.counters.total() else "none"

    def close(self) -> None:
        """Touch the page no more: it is about to be unmapped. The thread must have ended."""
        self._words.release()
        self.run.release()

    # What follows runs on the vCPU's thread.

    def _main(self, dispatcher: Dispatcher, halt: Halt, clock: Callable[[], int]) -> None:
        self._serve(dispatcher, halt, clock, self._be_kickable)

    def _serve(
        self, dispatcher: Dispatcher, halt: Halt, clock: Callable[[], int], begin: Callable[[], Stopped | None] | None
    ) -> None:
        try:
            ended = None if begin is None else begin()
            if ended is not None:
                halt(ended)
            while self._obey():
                ended = self._run(dispatcher, clock)
                if ended is not None:
                    halt(ended)
        except Exception as error:  # a vCPU thread must never end in silence
            halt(Stopped("machine", detail=f"vCPU {self.index}: {type(error).__name__}: {error}", t_ns=clock()))
        finally:
            self._faults_in_all = thread_faults() - self._faults_before
            with self._changed:
                self._order, self._parked, self._kickable = "stop", True, None
                self._changed.notify_all()

    def _be_kickable(self) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        self._block_inside_kvm_run(blocked - {KICK_SIGNAL})
        with self._changed:
            self._kickable = threading.get_ident()

    def _go_on(self, first: FirstRun, dispatcher: Dispatcher, clock: Callable[[], int]) -> Stopped | None:
        """Where the guest came out when it was entered ahead: with an exit, its access is half done until the next
        KVM_RUN, whatever the order is by now."""
        if first.result:
            self._take_kick(-first.result)
            return None
        told, self.on_first_exit = self.on_first_exit, None
        if told is not None:
            told(first.entered_ns, first.left_ns, first.faults)
        ended = self._slow(dispatcher)
        return self._run_until_kicked(dispatcher, clock) if ended is None else ended

    def _block_inside_kvm_run(self, blocked: set[int]) -> None:
        bits = sum(1 << (number - 1) for number in blocked)
        ioctl(self.fd, Request.KVM_SET_SIGNAL_MASK, KvmSignalMask(_KERNEL_SIGSET_BYTES, bits))

    def _obey(self) -> bool:
        """Follow the order: wait while it is to pause; False when it is to stop."""
        with self._changed:
            if self._order == "pause":
                self._parked = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._order != "pause")
                self._parked = False
            return self._order == "run"

    def _is_parked(self) -> bool:
        return self._parked or self._thread is None

    def _run(self, dispatcher: Dispatcher, clock: Callable[[], int]) -> Stopped | None:
        """As ``_run_until_kicked``, but tell of the first exit if somebody wants to know."""
        entered, faults = clock(), thread_faults() if self.on_first_exit is not None else NO_FAULTS
        while (told := self.on_first_exit) is not None:
            if raw_ioctl(self.fd, int(Request.KVM_RUN), 0):
                if self._take_kick(ctypes.get_errno()):
                    return None
                continue
            self.on_first_exit = None
            told(entered, clock(), thread_faults() - faults)
            ended = self._slow(dispatcher)
            if ended is not None:
                return ended
        return self._run_until_kicked(dispatcher, clock)

    def _run_until_kicked(self, dispatcher: Dispatcher, clock: Callable[[], int]) -> Stopped | None:
        """Run the guest until the vCPU is kicked (None) or the guest cannot run on (why)."""
        run, words, ports = self.run, self._words, self.counters.ports
        enter, arguments = self._entrance()
        while True:
            if failed := enter(*arguments):
                if self._take_kick(ctypes.get_errno() if enter is raw_ioctl else -failed):
                    return None
                continue
            begin = clock()
            port = ports.get(words[IO_KEY_WORD]) if words[EXIT_REASON_WORD] == KVM_EXIT_IO else None
            if port is None or words[IO_COUNT_WORD] != 1 or self.trace is not None:
                ended = self._slow(dispatcher)
                if ended is not None:
                    return ended
                continue
            with port.lock:
                if words[IO_KEY_WORD] & 1:
                    port.access(port.offset, run[dispatcher.io_data])
                else:
                    run[dispatcher.io_data] = port.access(port.offset)
            took = clock() - begin
            port.count += 1
            port.total_ns += took
            if took > port.max_ns:
                port.max_ns = took
            if took < port.min_ns:
                port.min_ns = took

    def _entrance(self) -> tuple[Callable[..., int], tuple[int, ...]]:
        """What enters the guest until the next kick: the native run loop, or plain KVM_RUN."""
        if self._fastpath is None or self.trace is not None:
            return raw_ioctl, (self.fd, int(Request.KVM_RUN), 0)
        return self._fastpath.run, (self.fd, self._run_address, self._fastpath.address)

    def _slow(self, dispatcher: Dispatcher) -> Stopped | None:
        if self.trace is not None:
            self.trace(self.index, time.monotonic_ns(), decode(self.run))
        current = dispatcher.answer()
        if not needs_stop(current):
            return None
        if self.on_ring_full is not None and current == _RING_FULL:
            self.on_ring_full()
            return None
        return self._verdict(current)

    def _take_kick(self, number: int) -> bool:
        """Whether KVM_RUN's errno was a kick; an AP that waits for its SIPI gives EAGAIN and runs again."""
        if number not in _TRANSIENT:
            raise OSError(number, os.strerror(number), "KVM_RUN")
        if number == errno.EAGAIN:
            return False
        with self._changed:
            signal.sigtimedwait([KICK_SIGNAL], 0)
            self.run[IMMEDIATE_EXIT] = 0
            self._kicked = False
        return True

    def _verdict(self, current: Exit) -> Stopped:
        reason: StopReason = "machine"
        detail, instruction = f"vCPU {self.index}: exit {current}", b""
        if isinstance(current, ShutdownExit):
            reason, detail = "triple-fault", f"vCPU {self.index}: triple fault"
        elif isinstance(current, FailEntryExit):
            reason, detail = "entry-failure", f"vCPU {self.index}: hardware reason {current.hardware_reason:#x}"
        elif isinstance(current, InternalErrorExit) and current.is_emulation_failure:
            reason, instruction = "emulation-failure", current.instruction
            detail = f"vCPU {self.index}: KVM cannot emulate {instruction.hex(' ') or 'an instruction'}"
        return Stopped(
            reason,
            detail=detail,
            last_exit=self.last_exit,
            rip=self.regs().rip,
            instruction=instruction,
            t_ns=time.monotonic_ns(),
        )
