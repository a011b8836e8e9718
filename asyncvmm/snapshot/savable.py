"""What keeps a VM from being saved and is known from what was asked for: refused before anything is waited for."""

from __future__ import annotations

from asyncvmm.config import Accel, VMConfig


def check_savable(config: VMConfig, accel: Accel) -> None:
    """Whether a VM of that configuration can be saved on that machine; ``auto`` for one that is not chosen yet.

    Raises SnapshotFailed.
    """
    if config.drives:
        from asyncvmm.storage.snapshot import check_drive_configs

        check_drive_configs(config.drives)
    if config.vsock is not None and accel == "qemu":
        from asyncvmm.machine.qemu.saved_facts import check_devices

        check_devices(config.devices)
