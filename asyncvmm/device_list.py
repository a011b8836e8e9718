"""DeviceConfig: all virtio devices of one VM. Apart from their records, which who has no devices need not import."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from asyncvmm.device_config import (
        BalloonConfig,
        ConsoleConfig,
        DriveConfig,
        NetConfig,
        RngConfig,
        VsockConfig,
    )


@attrs.frozen(kw_only=True)
class DeviceConfig:
    """Every virtio device of one VM, as asked for; what is None is not there."""

    drives: tuple[DriveConfig, ...] = ()
    net: NetConfig | None = None
    balloon: BalloonConfig | None = None
    vsock: VsockConfig | None = None
    rng: RngConfig | None = None
    console: ConsoleConfig | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """What each is: ``blk-<id>`` for drives, else its kind."""
        others = [name for name in ("net", "balloon", "vsock", "rng", "console") if getattr(self, name) is not None]
        return (*(f"blk-{drive.id or 'drive'}" for drive in self.drives), *others)
