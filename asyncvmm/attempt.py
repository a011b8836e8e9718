"""Attempt: one try at booting a VM, from the plan to the machine, with what the machine's devices stand on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from asyncvmm.accel import AccelChoice
from asyncvmm.config import VMConfig
from asyncvmm.device_imports import import_devices
from asyncvmm.machine.base import BootPlan, EffectSink, Machine
from asyncvmm.machine.choose import import_machine, make_machine
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.plan import make_plan
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.metrics.vm_metrics import VmMetrics
    from asyncvmm.resources import HostResources


class Attempt:
    """``machine`` is there once ``make`` has made it, and stays to be asked after ``free``."""

    def __init__(self, config: VMConfig, name: str, choice: AccelChoice, timeline: Timeline) -> None:
        self.machine: Machine | None = None
        self._config = config
        self._name = name
        self._choice = choice
        self._timeline = timeline
        self._plan: BootPlan | None = None
        self._resources: HostResources | None = None

    @property
    def made_plan(self) -> BootPlan | None:
        """What is booted, once it is decided, with what its devices stand on."""
        return self._plan

    async def plan(self) -> None:
        """Decide what to boot, and import what it takes. Raises ConfigError and its kinds."""
        self._plan = await run_in_thread(self._make_plan)

    async def make(self, on_effects: EffectSink, metrics: VmMetrics) -> Machine:
        """Make ready what the devices stand on, and the machine. Raises ConfigError and HostError, with their kinds."""
        plan = self._plan
        assert plan is not None
        if plan.devices.count:
            plan = self._plan = await self._with_resources(plan)
        self.machine = make_machine(self._choice, plan, self._timeline, on_effects, metrics)
        await self.machine.prepare()
        return self.machine

    async def free(self) -> None:
        """End the machine, then free what its devices stood on. May be called again."""
        try:
            if self.machine is not None:
                await self.machine.stop()
        finally:
            if self._resources is not None:
                await self._resources.aclose()

    def _make_plan(self) -> BootPlan:
        """On a worker thread."""
        with self._timeline.phase("machine_import"):
            import_machine(self._choice.accel)
            import asyncvmm.metrics.control
            import asyncvmm.upkeep  # noqa: F401
        with self._timeline.phase("plan"):
            plan = make_plan(self._config, self._name, self._choice.accel, self._choice.tsc_khz)
            import_devices(plan.devices, self._choice.accel)
            return plan

    async def _with_resources(self, plan: BootPlan) -> BootPlan:
        from asyncvmm.resources import HostResources

        self._resources = HostResources()
        await self._resources.make_ready(plan.devices, self._choice.accel, self._timeline)
        return attrs.evolve(plan, resources=self._resources.record)
