"""asyncvmm: microVMs inside your asyncio program.

    async with VM(VMConfig(memory_mib=256, vcpus=2)) as vm:
        timing = await vm.boot()

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncvmm.config import VMConfig as VMConfig
    from asyncvmm.console import Console as Console
    from asyncvmm.device_config import BalloonConfig as BalloonConfig
    from asyncvmm.device_config import ConsoleConfig as ConsoleConfig
    from asyncvmm.device_config import DriveConfig as DriveConfig
    from asyncvmm.device_config import NetConfig as NetConfig
    from asyncvmm.device_config import Publish as Publish
    from asyncvmm.device_config import RngConfig as RngConfig
    from asyncvmm.device_config import VsockConfig as VsockConfig
    from asyncvmm.effects import ExitCount as ExitCount
    from asyncvmm.effects import ExitStatistics as ExitStatistics
    from asyncvmm.errors import AsyncVMMError as AsyncVMMError
    from asyncvmm.errors import BootError as BootError
    from asyncvmm.errors import ConfigError as ConfigError
    from asyncvmm.errors import GuestError as GuestError
    from asyncvmm.errors import GuestStopped as GuestStopped
    from asyncvmm.errors import HostError as HostError
    from asyncvmm.errors import MachineError as MachineError
    from asyncvmm.errors import SnapshotDamaged as SnapshotDamaged
    from asyncvmm.errors import SnapshotError as SnapshotError
    from asyncvmm.errors import SnapshotFailed as SnapshotFailed
    from asyncvmm.errors import SnapshotMismatch as SnapshotMismatch
    from asyncvmm.errors import StateError as StateError
    from asyncvmm.errors import TriggerImpossible as TriggerImpossible
    from asyncvmm.events.hub import EventHub as EventHub
    from asyncvmm.snapshot.resources import SnapshotResources as SnapshotResources
    from asyncvmm.snapshot.shell_pool import ShellPool as ShellPool
    from asyncvmm.snapshot.snapshot import Snapshot as Snapshot
    from asyncvmm.timing.vm_timing import VmTiming as VmTiming
    from asyncvmm.vm import VM as VM

__version__ = "0.1.0"

_HOMES = {
    "VM": "asyncvmm.vm",
    "VMConfig": "asyncvmm.config",
    **dict.fromkeys(
        (
            "BalloonConfig",
            "ConsoleConfig",
            "DriveConfig",
            "NetConfig",
            "Publish",
            "RngConfig",
            "VsockConfig",
        ),
        "asyncvmm.device_config",
    ),
    "ShellPool": "asyncvmm.snapshot.shell_pool",
    "Snapshot": "asyncvmm.snapshot.snapshot",
    "SnapshotResources": "asyncvmm.snapshot.resources",
    "VmTiming": "asyncvmm.timing.vm_timing",
    "Console": "asyncvmm.console",
    "EventHub": "asyncvmm.events.hub",
    "ExitCount": "asyncvmm.effects",
    "ExitStatistics": "asyncvmm.effects",
    **dict.fromkeys(
        (
            "AsyncVMMError",
            "BootError",
            "ConfigError",
            "GuestError",
            "GuestStopped",
            "HostError",
            "MachineError",
            "SnapshotDamaged",
            "SnapshotError",
            "SnapshotFailed",
            "SnapshotMismatch",
            "StateError",
            "TriggerImpossible",
        ),
        "asyncvmm.errors",
    ),
}

__all__ = [
    *_HOMES,
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'asyncvmm' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
