"""A boot on QEMU with every device, cancelled at any moment, leaves nothing either: overlay, helper, sockets, QEMU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from asyncvmm import VM
from asyncvmm.device_config import ConsoleConfig, DriveConfig, VsockConfig
from tests.support.cancelling import cancel_after, cancel_at_phase
from tests.support.never_ready import held_now, never_ready, warm_up

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "gcc", "passt")]

PHASES = ("overlay", "network_helper", "qemu_cmd_build", "qemu_fork", "qemu_qmp_connect", "boot_wait")
DELAYS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


@pytest.fixture
def new_vm(toy_guest: Path, tmp_path: Path) -> Callable[[], VM]:
    """A VM whose guest looks at none of its devices."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    return lambda: never_ready(
        toy_guest,
        tmp_path,
        drives=(DriveConfig(path=image, overlay=True),),
        net="user",
        balloon=True,
        vsock=VsockConfig(uds_path=tmp_path / "vsock"),
        rng=True,
        virtio_console=ConsoleConfig(ports=("bulk",)),
    )


@pytest.mark.parametrize("phase", PHASES)
async def test_a_boot_cancelled_as_a_phase_begins_leaves_nothing(
    new_vm: Callable[[], VM], temporary_directory: Path, tmp_path: Path, phase: str
) -> None:
    await warm_up(new_vm)
    before = held_now()
    assert await cancel_at_phase(new_vm(), phase), "no such phase"
    assert held_now() == before
    assert not left_of(tmp_path)


@pytest.mark.parametrize("delay_s", DELAYS_S)
async def test_a_boot_cancelled_at_some_moment_leaves_nothing(
    new_vm: Callable[[], VM], temporary_directory: Path, tmp_path: Path, delay_s: float
) -> None:
    await warm_up(new_vm)
    before = held_now()
    assert not await cancel_after(new_vm(), delay_s)
    assert held_now() == before
    assert not left_of(tmp_path)


def left_of(directory: Path) -> list[Path]:
    """The vsock's unix socket, if it is there still."""
    return [path for path in directory.iterdir() if path.is_socket()]
