"""What a VM has of its machine: devices, what they count, and what is known of the exits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from asyncvmm.attempt import Attempt
from asyncvmm.config import VMConfig
from asyncvmm.effects import ExitStatistics
from asyncvmm.events.hub import EventHub
from asyncvmm.home_loop import HomeLoop
from asyncvmm.machine.base import AccelName, Machine
from asyncvmm.machine.choose import trace_exits

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from asyncvmm.balloon import Balloon, BalloonBackend
    from asyncvmm.machine.kvm.trace import ExitTrace
    from asyncvmm.metrics.control import VmMetricsControl
    from asyncvmm.vsock.host import VsockHost
    from asyncvmm.vsock.of_vm import Vsock


class MachineProperties(ABC):
    """The part of VM that is its machine's."""

    config: VMConfig
    events: EventHub
    _home: HomeLoop
    _attempt: Attempt | None

    @abstractmethod
    def _now(self) -> int:
        """Nanoseconds of the VM's time."""

    @property
    def _machine(self) -> Machine | None:
        return self._attempt.machine if self._attempt else None

    def _machine_for(self, what: str) -> Machine | None:
        """The machine, for a call that the VM's own loop alone may make. Raises StateError on another one."""
        self._home.check(what)
        return self._machine

    @property
    def accel(self) -> AccelName | None:
        """The machine underneath, ``kvm`` or ``qemu``; None before it is chosen."""
        return self._machine.accel if self._machine else None

    @property
    def exits(self) -> ExitStatistics | None:
        """Exits to userspace so far, by reason and address; None where the machine cannot tell."""
        return self._machine.exits() if self._machine else None

    def trace_exits(self, capacity: int = 4096) -> ExitTrace:
        """An async iterator over every exit from now on (TracedExit), for debugging; it slows the guest.

        Raises StateError unless the VM runs on KVM.
        """
        return trace_exits(self._machine, capacity)

    @cached_property
    def metrics(self) -> VmMetricsControl:
        """What the devices count. ``flush()`` publishes it as a ``metrics`` event; so does time, and the VM's end."""
        from asyncvmm.metrics.control import VmMetricsControl
        from asyncvmm.metrics.vm_metrics import VmMetrics

        return VmMetricsControl(VmMetrics(), self.events, self._now)

    @cached_property
    def balloon(self) -> Balloon:
        """The memory balloon; its calls raise StateError where there is none."""
        from asyncvmm.balloon import Balloon

        def find() -> BalloonBackend | None:
            machine = self._machine_for("balloon")
            return machine.balloon if machine else None

        return Balloon(find, self.config.memory_mib)

    @cached_property
    def vsock(self) -> Vsock:
        """The guest's sockets; its calls raise StateError before the machine is started, and without a vsock device."""
        from asyncvmm.vsock.of_vm import Vsock

        def find() -> VsockHost | None:
            machine = self._machine_for("vsock")
            return machine.vsock if machine else None

        return Vsock(find)

    @property
    def ports(self) -> Mapping[str, ByteStream]:
        """The virtio console's ports as byte streams, ``console`` first; empty before the machine is started."""
        return self._machine.ports if self._machine else {}
