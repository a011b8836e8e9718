"""What a KVM machine can be asked at any time: its devices, what it counted, its guest's clock. See Machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from asyncvmm.effects import ExitStatistics
from asyncvmm.machine.kvm.building import Building
from asyncvmm.machine.kvm.counting import Counting
from asyncvmm.metrics.vm_metrics import VmMetrics
from asyncvmm.timing.tsc import GuestTime

if TYPE_CHECKING:
    from anyio.abc import ByteStream

    from asyncvmm.balloon import BalloonBackend
    from asyncvmm.machine.kvm.devices import DeviceSet
    from asyncvmm.vsock.host import VsockHost


class Readings:
    """The part of KvmMachine that changes nothing."""

    _building: Building
    _counting: Counting
    _devices: DeviceSet | None

    @property
    def balloon(self) -> BalloonBackend | None:
        """See Machine."""
        return self._devices.balloon if self._devices else None

    @property
    def ports(self) -> Mapping[str, ByteStream]:
        """See Machine."""
        return self._devices.ports if self._devices else {}

    @property
    def vsock(self) -> VsockHost | None:
        """See Machine."""
        return self._devices.vsock if self._devices else None

    def exits(self) -> ExitStatistics | None:
        """The sum of all vCPUs' counters; after the end, as they stood then."""
        return self._counting.exits()

    def meter(self, metrics: VmMetrics) -> None:
        """Have exits, serial ports and keyboard controller counted in their groups at each flush."""
        self._counting.meter(metrics)

    def progress(self) -> int:
        """Exits so far."""
        return self._counting.progress()

    def activity(self) -> int:
        """Exits so far, but for those at the control line."""
        return self._counting.activity()

    def guest_instant(self, tsc: int) -> tuple[int, int] | None:
        """By KVM's TSC offset and samples of the host's two clocks."""
        return None if self._building.guest_tsc is None else self._building.guest_tsc.instant(tsc)

    def guest_time(self) -> GuestTime | None:
        """By KVM's TSC offset."""
        vm, tsc = self._building.vm, self._building.guest_tsc
        return None if vm is None or tsc is None else tsc.now(vm.tsc_khz)
