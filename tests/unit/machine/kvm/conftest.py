"""A set of devices, one of each kind but the network card; the native library."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, RngConfig, VsockConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.devices.virtio.blk import SECTOR
from asyncvmm.machine.kvm.fastpath.binding import Library, load
from tests.support.disk_writer import SECTORS


@pytest.fixture
def image(tmp_path: Path, temporary_directory: Path) -> Path:
    """An empty disk."""
    path = tmp_path / "image"
    path.write_bytes(bytes(SECTORS * SECTOR))
    return path


@pytest.fixture
def config(image: Path) -> DeviceConfig:
    """The devices, the disk behind an overlay."""
    return DeviceConfig(
        drives=(DriveConfig(path=image, id="disk", overlay=True),),
        rng=RngConfig(bytes_per_s=0),
        console=ConsoleConfig(),
        vsock=VsockConfig(),
        balloon=BalloonConfig(mib=7),
    )


@pytest.fixture
def library() -> Library:
    """For tests that require ``native-library``."""
    found = load()
    assert found is not None
    return found
