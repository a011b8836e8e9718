"""RestoreAttempt: one try at becoming the VM that a snapshot holds, from the plan to the machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from asyncvmm.accel import AccelChoice, KvmFacts, choose_accel
from asyncvmm.attempt import Attempt
from asyncvmm.config import VMConfig
from asyncvmm.device_imports import import_devices
from asyncvmm.errors import SnapshotDamaged
from asyncvmm.machine.base import BootPlan, EffectSink, Machine
from asyncvmm.machine.choose import import_machine, make_machine
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.metrics.vm_metrics import VmMetrics


_REASON = "the snapshot's machine"
_KVM = AccelChoice(requested="kvm", accel="kvm", reason=_REASON, kvm=KvmFacts(present=True, usable=True))
_QEMU = AccelChoice(requested="qemu", accel="qemu", reason=_REASON, kvm=KvmFacts(present=False, usable=False))

_IMPORTED_LAST = {"kvm": "asyncvmm.machine.kvm.restoring", "qemu": "asyncvmm.machine.qemu.machine"}
"""Of what a restore on each machine takes."""
_BESIDE = ("asyncvmm.metrics.control", "asyncvmm.upkeep")


async def choose_machine(snapshot: Snapshot) -> AccelChoice:
    """The machine that made it. Whether it is to be had is found out later: on KVM by the restore itself."""
    return _KVM if snapshot.manifest.machine == "kvm" else _QEMU


class RestoreAttempt(Attempt):
    """As Attempt; ``make`` gives a machine that is to be told to ``restore``."""

    def __init__(
        self,
        snapshot: Snapshot,
        config: VMConfig,
        name: str,
        choice: AccelChoice,
        timeline: Timeline,
        track_dirty: bool,
    ) -> None:
        super().__init__(config, name, choice, timeline)
        self._snapshot = snapshot
        self._track_dirty = track_dirty

    async def plan(self) -> None:
        """Find out what QEMU can run on, and import what it takes, the first time.

        Raises QemuUnavailable and SnapshotDamaged.
        """
        if self._choice is _QEMU:
            with self._timeline.phase("accel"):
                self._choice = await choose_accel("qemu")
        self._plan = self._saved_plan()
        if not _imported(self._choice.accel):
            await run_in_thread(self._import)

    async def make(self, on_effects: EffectSink, metrics: VmMetrics) -> Machine:
        """Make ready what the devices stand on, and the machine. Raises ConfigError and HostError, with their kinds."""
        plan = self._plan
        assert plan is not None
        if plan.devices.count:
            plan = self._plan = await self._with_saved_resources(plan)
        self.machine = make_machine(self._choice, plan, self._timeline, on_effects, metrics)
        return self.machine

    def _import(self) -> None:
        with self._timeline.phase("machine_import"):
            import_machine(self._choice.accel)
            import_devices(self._config.devices, self._choice.accel)
            resources = ["asyncvmm.resources"] * bool(self._config.devices.count)
            for name in (*_BESIDE, *resources, _IMPORTED_LAST[self._choice.accel]):
                import_module(name)

    def _saved_plan(self) -> BootPlan:
        saved = self._snapshot.manifest.extra.get("plan")
        config = self._config
        return BootPlan(
            name=self._name,
            memory_mib=config.memory_mib,
            vcpus=config.vcpus,
            kernel=Path(_text(saved, "kernel") or ""),
            initrd=None if (initrd := _text(saved, "initrd")) is None else Path(initrd),
            cmdline=_text(saved, "cmdline") or "",
            tsc_khz=None if _number(saved, "tsc_khz") is None else self._choice.tsc_khz,
            acpi=config.acpi,
            devices=config.devices,
            track_dirty=self._track_dirty,
        )

    async def _with_saved_resources(self, plan: BootPlan) -> BootPlan:
        from asyncvmm.resources import HostResources, SavedResources

        loaded = self._snapshot.loaded
        disks = SavedResources(drives=loaded.manifest.extra.get("disks"), open_file=loaded.open_file)
        saved = disks if plan.devices.drives else None
        self._resources = HostResources()
        await self._resources.make_ready(plan.devices, self._choice.accel, self._timeline, saved)
        return attrs.evolve(plan, resources=self._resources.record)


def _imported(accel: str) -> bool:
    return _IMPORTED_LAST[accel] in sys.modules


def _text(saved: object, name: str) -> str | None:
    value = _field(saved, name)
    if value is not None and not isinstance(value, str):
        raise SnapshotDamaged(f"saved plan's {name}", expected="text", found=repr(value)[:80])
    return value


def _number(saved: object, name: str) -> int | None:
    value = _field(saved, name)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 32):
        raise SnapshotDamaged(f"saved plan's {name}", expected="a number", found=repr(value)[:80])
    return value


def _field(saved: object, name: str) -> Any:
    if not isinstance(saved, Mapping):
        raise SnapshotDamaged("saved plan", expected="an object", found=repr(saved)[:80])
    return saved.get(name)
