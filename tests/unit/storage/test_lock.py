from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.errors import DriveBusy
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.storage.lock import lock_image, unlock_image

Open = Callable[[int], int]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def opened(image: Path) -> Iterator[Open]:
    fds: list[int] = []

    def open_(flags: int) -> int:
        fds.append(os.open(image, flags | os.O_CLOEXEC))
        return fds[-1]

    yield open_
    for fd in fds:
        os.close(fd)


def test_two_writers_do_not_share_an_image(image: Path, opened: Open) -> None:
    lock_image(opened(os.O_RDWR), image, writer=True)
    with pytest.raises(DriveBusy, match=r"disk\.img in use"):
        lock_image(opened(os.O_RDWR), image, writer=True)


def test_a_reader_and_a_writer_do_not_share_an_image(image: Path, opened: Open) -> None:
    reader, writer = opened(os.O_RDONLY), opened(os.O_RDWR)
    lock_image(reader, image, writer=False)
    with pytest.raises(DriveBusy, match="expected an image nobody else uses"):
        lock_image(writer, image, writer=True)
    unlock_image(reader)
    lock_image(writer, image, writer=True)
    with pytest.raises(DriveBusy, match="expected an image nobody writes"):
        lock_image(reader, image, writer=False)


def test_many_readers_share_an_image(image: Path, opened: Open) -> None:
    for _ in range(5):
        lock_image(opened(os.O_RDONLY), image, writer=False)


def test_who_was_refused_leaves_no_lock_behind(image: Path, opened: Open) -> None:
    reader, refused = opened(os.O_RDONLY), opened(os.O_RDWR)
    lock_image(reader, image, writer=False)
    with pytest.raises(DriveBusy):
        lock_image(refused, image, writer=True)
    lock_image(opened(os.O_RDONLY), image, writer=False)


def test_closing_ends_the_lock(image: Path, opened: Open) -> None:
    fd = os.open(image, os.O_RDWR)
    lock_image(fd, image, writer=True)
    os.close(fd)
    lock_image(opened(os.O_RDWR), image, writer=True)


@pytest.mark.requires("qemu")
@pytest.mark.parametrize("read_only", ["on", "off"])
@pytest.mark.parametrize("writer", [True, False])
def test_qemu_and_we_respect_each_other(image: Path, opened: Open, writer: bool, read_only: str) -> None:
    lock_image(opened(os.O_RDWR if writer else os.O_RDONLY), image, writer=writer)
    done = subprocess.run(
        [
            *(find_qemu().path, "-M", "q35", "-m", "32", "-display", "none", "-nodefaults", "-monitor", "stdio", "-S"),
            *("-blockdev", f"driver=file,node-name=f,filename={image},read-only={read_only}"),
            *("-blockdev", f"driver=raw,node-name=d,file=f,read-only={read_only}"),
            *("-device", "virtio-blk-pci,drive=d"),
        ],
        input="quit\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    shared = not writer and read_only == "on"
    assert (done.returncode == 0) is shared, done.stderr
    assert shared or "lock" in done.stderr
