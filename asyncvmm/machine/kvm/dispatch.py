"""Answering exits: from the kvm_run page to the bus and back, on the vCPU thread.

Byte-wide single port accesses (a UART's, nearly all there are) take the hot path in ``vcpu.py`` once they are resolved
here; everything else is decoded into a typed exit first.
"""

from __future__ import annotations

from collections.abc import Callable

from asyncvmm.bus import Bus
from asyncvmm.machine.kvm.exits import (
    IO_DATA_OFFSET_QUAD,
    MMIO_DATA,
    Exit,
    IoExit,
    MmioExit,
    decode,
    exit_name,
    io_key,
)
from asyncvmm.machine.kvm.statistics import PortCounter, VcpuCounters, port_label

MOST_HOT_PORTS = 64


class Dispatcher:
    """One vCPU's exits, answered from the VM's bus."""

    def __init__(self, bus: Bus, run: memoryview, counters: VcpuCounters, clock: Callable[[], int]) -> None:
        self._bus = bus
        self._run = run
        self._counters = counters
        self._clock = clock
        self.io_data = int(run.cast("Q")[IO_DATA_OFFSET_QUAD])

    def answer(self) -> Exit:
        """Decode the exit that stands in the page, answer it if it is an access, count it, and return it."""
        begin = self._clock()
        current = decode(self._run)
        label = None
        if isinstance(current, IoExit):
            label = port_label(current.is_out, current.port)
            self._answer_io(current)
        elif isinstance(current, MmioExit):
            label = f"mmio-{'write' if current.is_write else 'read'} {current.address:#x}"
            self._answer_mmio(current)
        reason = exit_name(int.from_bytes(self._run[8:12], "little"))
        self._counters.add(reason, label, self._clock() - begin)
        return current

    def _answer_io(self, access: IoExit) -> None:
        size, port = access.size, access.port
        for offset in range(access.data_offset, access.data_offset + size * access.count, size):
            if access.is_out:
                self._bus.write(port, int.from_bytes(self._run[offset : offset + size], "little"), size)
            else:
                self._run[offset : offset + size] = self._bus.read(port, size).to_bytes(size, "little")
        if size == 1:
            self._resolve(access)

    def _answer_mmio(self, access: MmioExit) -> None:
        if access.is_write:
            self._bus.write_mmio(access.address, int.from_bytes(access.data, "little"), access.size)
        else:
            value = self._bus.read_mmio(access.address, access.size)
            self._run[MMIO_DATA : MMIO_DATA + access.size] = value.to_bytes(access.size, "little")

    def _resolve(self, access: IoExit) -> None:
        key = io_key(access.is_out, 1, access.port)
        attachment = self._bus.lookup(access.port)
        if attachment is None or key in self._counters.ports or len(self._counters.ports) >= MOST_HOT_PORTS:
            return
        self.io_data = access.data_offset
        method = attachment.device.write if access.is_out else attachment.device.read
        self._counters.ports[key] = PortCounter(method, access.port - attachment.first, attachment.lock)


def needs_stop(current: Exit) -> bool:
    """Whether the guest cannot run on as it is. HLT is among them: the irqchip in the kernel never shows it."""
    return not isinstance(current, IoExit | MmioExit)
