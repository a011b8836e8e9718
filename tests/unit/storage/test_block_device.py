"""Block devices: loop devices on files of our own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncvmm.device_config import CacheMode, DriveConfig
from asyncvmm.errors import DriveBusy
from asyncvmm.storage.direct import DirectImage
from asyncvmm.storage.opening import open_image
from asyncvmm.storage.overlay import make_overlay
from tests.support.requirements import CHECKS, Problem

SIZE = 4 << 20
PATTERN = os.urandom(SIZE)


def _loop_devices() -> Problem:
    """Whether this process may attach a file to a loop device."""
    done = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 and os.geteuid() == 0 else done.stderr.strip() or "run as root"


CHECKS.setdefault("loop-devices", _loop_devices)
pytestmark = pytest.mark.requires("loop-devices")


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    done = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    yield path
    subprocess.run(["losetup", "-d", path], check=True)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device_is_a_disk(device: Path, backing: Path, cache: CacheMode) -> None:
    image = open_image(DriveConfig(path=device, cache=cache))
    assert image.size == SIZE
    assert isinstance(image, DirectImage) is (cache == "none")
    image.write(512, [b"w" * 1024], sync=True)
    assert image.read(0, 4096) == PATTERN[:512] + b"w" * 1024 + PATTERN[1536:4096]
    image.flush()
    image.close()
    assert backing.read_bytes() == PATTERN[:512] + b"w" * 1024 + PATTERN[1536:]


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_reach_a_block_device(device: Path, unmap: bool) -> None:
    image = open_image(DriveConfig(path=device))
    image.zero(4096, 1 << 20, unmap=unmap)
    assert image.read(0, (1 << 20) + 8192) == PATTERN[:4096] + bytes(1 << 20) + PATTERN[4096 + (1 << 20) :][:4096]
    image.close()


def test_discards_reach_a_block_device(device: Path, backing: Path) -> None:
    before = backing.stat().st_blocks
    image = open_image(DriveConfig(path=device))
    image.discard(0, 1 << 20)
    image.flush()
    image.close()
    assert backing.stat().st_blocks < before


def test_a_block_device_that_somebody_uses_is_not_written(device: Path) -> None:
    image = open_image(DriveConfig(path=device))
    with pytest.raises(DriveBusy, match=f"{device} in use"):
        open_image(DriveConfig(path=device))
    image.close()
    open_image(DriveConfig(path=device)).close()


def test_a_clone_of_a_block_device_leaves_it_alone(device: Path, tmp_path: Path) -> None:
    image = open_image(DriveConfig(path=device, overlay=True), make_overlay(device, None, directory=tmp_path))
    image.write(SIZE - 512, [b"c" * 512])
    assert image.read(SIZE - 1024, 1024) == PATTERN[-1024:-512] + b"c" * 512
    image.close()
    assert device.read_bytes() == PATTERN
