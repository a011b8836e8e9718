"""What a snapshot keeps of the virtio-mmio transport, registers (virtio 1.2, section 4.2.2) and queues; its checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs

from asyncvmm.devices.checks import hex_bytes, integer, shown
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    KNOWN_STATUS,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.memory import GuestFault, GuestView
from asyncvmm.devices.virtio.registers import CONFIG
from asyncvmm.errors import ConfigError

_WORD: Final = (1 << 32) - 1
_FEATURES: Final = (1 << 64) - 1


@attrs.frozen(kw_only=True)
class MmioState:
    """The registers. ``wanted``: the features the driver wrote, ``acked`` those it was granted; ``config``: the
    configuration space."""

    device_id: int
    status: int
    wanted: int
    acked: int
    features_sel: int
    driver_features_sel: int
    queue_sel: int
    interrupt_status: int
    config_generation: int
    config: bytes

    @classmethod
    def of_record(cls, record: Mapping[str, Any], device: VirtioDevice, offered: int) -> MmioState:
        """What ``record`` says of the registers of ``device``, to whose driver the features ``offered`` are.

        Raises ConfigError for what they cannot have been.
        """
        if (found := integer(record, "device_id", _WORD)) != device.device_id:
            raise ConfigError("saved device id", expected=device.device_id, found=found)
        state = cls(
            device_id=found,
            wanted=integer(record, "wanted", _FEATURES),
            status=_status(record),
            acked=integer(record, "acked", _FEATURES),
            features_sel=integer(record, "features_sel", _WORD),
            driver_features_sel=integer(record, "driver_features_sel", _WORD),
            queue_sel=integer(record, "queue_sel", _WORD),
            interrupt_status=integer(record, "interrupt_status", 3),
            config_generation=integer(record, "config_generation", _WORD),
            config=_config(record, len(device.config)),
        )
        state._check_features(offered)
        return state

    def record(self) -> dict[str, Any]:
        """As plain values that JSON can carry."""
        return {**attrs.asdict(self), "config": self.config.hex()}

    def _check_features(self, offered: int) -> None:
        """The driver was granted what it asked for, or nothing yet."""
        if not self.status & STATUS_FEATURES_OK:
            if self.acked:
                raise ConfigError("saved features", expected="none without FEATURES_OK", found=f"{self.acked:#x}")
        elif self.acked != self.wanted or not is_acceptable(self.wanted, offered):
            expected = f"VERSION_1 and others of {offered:#x}, as wanted"
            raise ConfigError("saved features", expected=expected, found=f"{self.acked:#x} of {self.wanted:#x}")


def is_acceptable(wanted: int, offered: int) -> bool:
    """Whether a driver may have the features ``wanted``: no others than ``offered``, and not without VERSION_1."""
    return not wanted & ~offered and bool(wanted >> VIRTIO_F_VERSION_1 & 1)


def restore_queues(saved: object, device: VirtioDevice, memory: GuestView, status: int) -> None:
    """Have each of the device's queues become what ``saved`` says. Raises ConfigError for what cannot have been."""
    if not isinstance(saved, list) or len(saved) != len(device.queues):
        raise ConfigError("saved queues", expected=f"a list of {len(device.queues)}", found=shown(saved))
    rings = {"event_idx": device.has(VIRTIO_F_EVENT_IDX), "indirect": device.has(VIRTIO_F_INDIRECT_DESC)}
    try:
        for queue, record in zip(device.queues, saved, strict=True):
            queue.restore(record, memory, **rings)
    except GuestFault as fault:
        raise ConfigError("saved queue", expected="one in guest RAM", found=str(fault)) from None
    ready = [index for index, queue in enumerate(device.queues) if queue.ready]
    if ready and not status & STATUS_FEATURES_OK:
        raise ConfigError("saved queues", expected="none ready before the features are", found=f"{ready} ready")


def _status(record: Mapping[str, Any]) -> int:
    status = integer(record, "status", 0xFF)
    if status & ~KNOWN_STATUS:
        raise ConfigError("saved status", expected=f"bits of {KNOWN_STATUS:#x}", found=f"{status:#x}")
    if status & (STATUS_DRIVER_OK | STATUS_FEATURES_OK) == STATUS_DRIVER_OK:
        raise ConfigError("saved status", expected="FEATURES_OK before DRIVER_OK", found=f"{status:#x}")
    return status


def _config(record: Mapping[str, Any], size: int) -> bytes:
    config = hex_bytes(record, "config", CONFIG)
    if len(config) != size:
        raise ConfigError("saved config", expected=f"{size} bytes", found=len(config))
    return config
