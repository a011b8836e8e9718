"""The one place that knows both machines. Each is imported when it is first needed: a program uses one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncvmm.accel import AccelChoice
from asyncvmm.errors import StateError
from asyncvmm.machine.base import AccelName, BootPlan, EffectSink, Machine
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.trace import ExitTrace
    from asyncvmm.metrics.vm_metrics import VmMetrics


def import_machine(accel: AccelName) -> None:
    """Import what ``make_machine`` needs, which takes its time the first time: not for the loop."""
    if accel == "kvm":
        import asyncvmm.machine.kvm.machine
    else:
        import asyncvmm.machine.qemu.machine  # noqa: F401


def make_machine(
    choice: AccelChoice, plan: BootPlan, timeline: Timeline, on_effects: EffectSink, metrics: VmMetrics
) -> Machine:
    """The machine that was chosen, not started. ``metrics``: what its devices are to count in."""
    if choice.accel == "kvm":
        from asyncvmm.machine.kvm.machine import KvmMachine

        return KvmMachine(plan, timeline, on_effects, metrics)
    from asyncvmm.machine.qemu.machine import QemuMachine

    return QemuMachine(plan, timeline, on_effects, metrics, accel=choice.qemu_accel)


def trace_exits(machine: Machine | None, capacity: int) -> ExitTrace:
    """Trace a machine's exits. Raises StateError where that machine has none to show."""
    if machine is None or machine.accel != "kvm":
        raise StateError("exit trace", expected="a VM on KVM", found="none" if machine is None else machine.accel)
    from asyncvmm.machine.kvm.machine import KvmMachine
    from asyncvmm.machine.kvm.trace import ExitTrace

    assert isinstance(machine, KvmMachine)
    return ExitTrace(machine, capacity)
