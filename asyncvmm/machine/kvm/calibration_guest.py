"""The smallest VM that runs ring-0 code: 64 KiB, one vCPU, no interrupt controller, no thread, no bus.

It exists to be measured (``calibrate``). The program it runs is ``asyncvmm/guest/calibrate.S``; here is what both must
agree on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from pathlib import Path

from asyncvmm.errors import KvmIoctlError, KvmUnavailable
from asyncvmm.machine.kvm.abi import MAX_CPUID_ENTRIES, KvmCpuid2, KvmSignalMask, Request
from asyncvmm.machine.kvm.creation import create_vcpu, create_vm
from asyncvmm.machine.kvm.exits import (
    EXIT_REASON_WORD,
    IMMEDIATE_EXIT,
    IO_DATA_OFFSET_QUAD,
    IO_KEY_WORD,
    KVM_EXIT_IO,
    decode,
    io_key,
)
from asyncvmm.machine.kvm.fastpath.chain import Chain, Made
from asyncvmm.machine.kvm.fds import ioctl, raw_ioctl
from asyncvmm.machine.kvm.mapped import mapped_view
from asyncvmm.machine.kvm.memory import GuestMemory, map_memory, register_memory
from asyncvmm.machine.kvm.registers import set_boot_state
from asyncvmm.machine.kvm.system import open_system, refusal
from asyncvmm.machine.kvm.vcpu import KICK_SIGNAL
from asyncvmm.x86.cpu import gdt, long_mode_cpu
from asyncvmm.x86.layout import GDT_ADDRESS, KIB, PAGE_TABLES, Region
from asyncvmm.x86.paging import identity_page_tables

PORT = 0xE0
EXITS = 16
"""OUTs back to back at the end of each pass."""
INSTRUCTIONS_PER_ROUND = 8

ASK = io_key(False, 4, PORT)
"""The IN by which the guest asks for the rounds of its next loop."""
REPORT = io_key(True, 4, PORT)
"""The OUT by which it says how long the loop took, in units of TICKS of its TSC."""
TICKS = 1024
MARK = io_key(True, 1, PORT)
"""One of the OUTs back to back."""

_MEMORY = 64 * KIB
_REGIONS = (Region(0, _MEMORY),)
_ENTRY = 0x1000
_KERNEL_SIGSET_BYTES = 8


class Interrupted(Exception):
    """The guest was kicked out of KVM_RUN for good."""


class CalibrationGuest:
    """A VM with the program loaded. All calls but ``kick`` are the creating thread's."""

    def __init__(self, path: Path, program: bytes) -> None:
        """Create it. Raises KvmUnavailable, KvmIoctlError, MemorySizeError."""
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._open = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        self._made = self._create(path, program)
        self._words, self._quads = self._run.cast("I"), self._run.cast("Q")

    def _load(self, memory: GuestMemory, program: bytes) -> None:
        memory.write(_ENTRY, program)
        memory.write(GDT_ADDRESS, gdt(long_mode_cpu(_ENTRY)))
        memory.write(PAGE_TABLES, identity_page_tables(_MEMORY))
        memory.close()

    def _create(self, path: Path, program: bytes) -> Made:
        chain = Chain()
        system = open_system(chain, path)
        vm = create_vm(chain, system)
        memory = map_memory(chain, _REGIONS)
        register_memory(chain, vm, memory, _REGIONS)
        vcpu = create_vcpu(chain, vm, 0, system)
        cpuid = chain.data(KvmCpuid2(nent=MAX_CPUID_ENTRIES))
        chain.ioctl(Request.KVM_GET_SUPPORTED_CPUID, system.fd, cpuid)
        chain.ioctl(Request.KVM_SET_CPUID2, vcpu.fd, cpuid)
        set_boot_state(chain, vcpu.fd, long_mode_cpu(_ENTRY))
        chain.ioctl(Request.KVM_SET_SIGNAL_MASK, vcpu.fd, chain.data(_mask_that_lets_kicks_in()))
        made = chain.program().run()
        try:
            if made.failure is not None:
                raise refusal(made.failure, path)
            self._fd = made[vcpu.fd]
            self._run = mapped_view(made[vcpu.page], made[system.run_size])
            self._load(GuestMemory(_REGIONS, made[memory]), program)
        except BaseException:
            made.undo()
            raise
        return made

    def run_to(self, key: int) -> None:
        """Run until the guest makes the port access ``key``. Raises Interrupted, or KvmUnavailable for other exits."""
        while raw_ioctl(self._fd, int(Request.KVM_RUN), None):
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EAGAIN):
                raise KvmIoctlError("KVM_RUN", number, os.strerror(number))
            if self._run[IMMEDIATE_EXIT]:
                raise Interrupted
        if self._words[EXIT_REASON_WORD] != KVM_EXIT_IO or self._words[IO_KEY_WORD] != key:
            raise KvmUnavailable(
                "KVM running a tiny guest", expected=f"access to port {PORT:#x}", found=f"{decode(self._run)}"
            )

    def answer(self, value: int) -> None:
        """Give the IN at which the guest stands its value, 32 bits."""
        offset = self._quads[IO_DATA_OFFSET_QUAD]
        self._run[offset : offset + 4] = value.to_bytes(4, "little")

    def written(self) -> int:
        """The 32 bits of the OUT at which the guest stands."""
        offset = self._quads[IO_DATA_OFFSET_QUAD]
        return int.from_bytes(self._run[offset : offset + 4], "little")

    def tsc_khz(self) -> int | None:
        """KVM_GET_TSC_KHZ; None where KVM does not know."""
        try:
            return ioctl(self._fd, Request.KVM_GET_TSC_KHZ) or None
        except KvmIoctlError:
            return None

    def kick(self) -> None:
        """Make ``run_to`` raise Interrupted, now or when it is called. From another thread; after ``close`` nothing."""
        # Under the lock, because the page must not go away underneath, nor the thread end before it is signalled.
        with self._lock:
            if self._open:
                self._run[IMMEDIATE_EXIT] = 1
                signal.pthread_kill(self._thread, KICK_SIGNAL)

    def close(self) -> None:
        """Free it all. May take tens of milliseconds."""
        with self._lock:
            self._open = False
        for view in (self._words, self._quads, self._run):
            view.release()
        self._made.undo()


def _mask_that_lets_kicks_in() -> KvmSignalMask:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set()) - {KICK_SIGNAL}
    return KvmSignalMask(_KERNEL_SIGSET_BYTES, sum(1 << (number - 1) for number in blocked))
