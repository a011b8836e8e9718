"""What a KVM machine counts: exits by vCPU, and what its serial ports and keyboard controller did."""

from __future__ import annotations

from asyncvmm.effects import ExitStatistics
from asyncvmm.machine.kvm.building import Building
from asyncvmm.machine.kvm.statistics import VcpuCounters, collect, posted_counters
from asyncvmm.metrics.groups import I8042Metrics, UartMetrics
from asyncvmm.metrics.sources import copy_i8042, sum_uart, sum_vcpus
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.x86 import layout


class Counting:
    """Of the machine that is being, or was, built."""

    def __init__(self, building: Building) -> None:
        self._building = building
        self._final: ExitStatistics | None = None

    def exits(self) -> ExitStatistics | None:
        """The sum of all vCPUs' counters; after ``keep``, as they stood then."""
        board = self._building.board
        if self._building.vm is None or board is None:
            return self._final
        return collect(self._counters(), board.bus.unmapped)

    def keep(self) -> None:
        """The VM is about to go."""
        self._final = self.exits()

    def progress(self) -> int:
        """Exits so far."""
        return sum(counters.total() for counters in self._counters())

    def activity(self) -> int:
        """Exits so far, but for those at the control line."""
        control = (layout.COM2_PORT, layout.SERIAL_PORT_SIZE)
        return sum(counters.total() - counters.at_ports(*control) for counters in self._counters())

    def meter(self, metrics: VmMetrics) -> None:
        """Have all of it counted in its groups at each flush."""
        metrics.count_by("vcpu", lambda: sum_vcpus(metrics.vcpu, self.exits()))
        metrics.count_by("uart", lambda: self._sum_uart(metrics.uart))
        metrics.count_by("i8042", lambda: self._copy_i8042(metrics.i8042))

    def _counters(self) -> list[VcpuCounters]:
        vm, fastpath = self._building.vm, self._building.fastpath
        if vm is None:
            return []
        counters = [vcpu.counters for vcpu in vm.vcpus]
        return [*counters, posted_counters(fastpath, vm.tsc_khz)] if fastpath else counters

    def _sum_uart(self, group: UartMetrics) -> None:
        board = self._building.board
        if board is not None:
            ports = (board.console, board.control)
            for port in ports:
                port.transmitted()  # collects what the native run loop keeps aside
            sum_uart(group, [port.device for port in ports])

    def _copy_i8042(self, group: I8042Metrics) -> None:
        if self._building.board is not None:
            copy_i8042(group, self._building.board.i8042)
