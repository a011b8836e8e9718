"""What a VM can be asked about the times it took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncvmm.timing.boot_profile import BootProfile
from asyncvmm.timing.guest_clock import GuestClock
from asyncvmm.timing.profiles import (
    CreateVmProfile,
    GuestBootProfile,
    RestoreProfile,
    RuntimeRestoreProfile,
    VcpuSetupProfile,
)
from asyncvmm.timing.vm_timing import VmTiming

if TYPE_CHECKING:
    from asyncvmm.report import BootReport
    from asyncvmm.watch import GuestWatch


class TimingProperties:
    """The part of VM that tells its times."""

    _report: BootReport
    _watch: GuestWatch

    @property
    def guest_profile(self) -> GuestBootProfile:
        """The guest's boot stages recorded so far."""
        return self._watch.contract.profile

    @property
    def guest_clock(self) -> GuestClock | None:
        """How the guest's clock stands to the VM's time axis, and how sure that is; None before it is known."""
        return self._watch.guest_clock

    @property
    def timing(self) -> VmTiming | None:
        """What boot() returned; None before."""
        return self._report.timing

    @property
    def boot_profile(self) -> BootProfile:
        """The boot's steps, in ns; fields are None where they are not recorded (yet), or do not apply.

        Of a boot that failed or was cancelled it has the steps that its last attempt came to.
        """
        return self._report.boot_profile(self.guest_profile)

    @property
    def create_vm_profile(self) -> CreateVmProfile:
        """The steps of creating the VM, in ns; None fields as above."""
        return self._report.create_vm_profile()

    @property
    def vcpu_setup_profile(self) -> VcpuSetupProfile | None:
        """The configuration of the vCPUs, in ns; None before it is done, and on QEMU."""
        return self._report.vcpu_setup_profile()

    @property
    def restore_profile(self) -> RestoreProfile | None:
        """The steps of the restore that made the VM, in ns; None if it was booted, and for one made in a shell."""
        return self._report.restore_profile()

    @property
    def runtime_restore_profile(self) -> RuntimeRestoreProfile | None:
        """The steps of a restore into a shell, in ns; None for other VMs."""
        return self._report.runtime_restore_profile()
