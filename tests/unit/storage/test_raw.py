from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.device_config import DriveConfig
from asyncvmm.errors import DriveBusy, DriveError
from asyncvmm.storage.direct import DirectImage
from asyncvmm.storage.opening import open_image
from asyncvmm.storage.raw import RawImage, behind

Kind = Callable[[int, int], RawImage]
kinds = pytest.mark.parametrize("kind", [RawImage, DirectImage])


def opened(path: Path, kind: Kind = RawImage, flags: int = os.O_RDWR) -> RawImage:
    fd = os.open(path, flags | os.O_CLOEXEC)
    return kind(fd, os.fstat(fd).st_size)


def image_of(directory: Path, data: bytes) -> Path:
    path = directory / "disk.img"
    path.write_bytes(data)
    return path


PATTERN = bytes(os.urandom(64 << 10))


@kinds
def test_what_was_written_is_read(tmp_path: Path, kind: Kind) -> None:
    image = opened(image_of(tmp_path, PATTERN), kind)
    image.write(4096, [b"a" * 512, memoryview(b"b" * 1024)])
    image.flush()
    assert image.read(4096, 2048) == b"a" * 512 + b"b" * 1024 + PATTERN[4096 + 1536 : 4096 + 2048]
    image.close()


@kinds
def test_large_requests_are_done_in_full(tmp_path: Path, kind: Kind) -> None:
    image = opened(image_of(tmp_path, bytes(4 << 20)), kind)
    data = os.urandom((2 << 20) + 512)
    image.write(512, [memoryview(data)[start : start + 700] for start in range(0, len(data), 700)])
    assert image.read(512, len(data)) == data
    image.close()


@kinds
def test_a_synchronous_write_is_read_back(tmp_path: Path, kind: Kind) -> None:
    image = opened(image_of(tmp_path, PATTERN), kind)
    image.write(0, [b"s" * 4096], sync=True)
    assert image.read(0, 4096) == b"s" * 4096
    image.close()


@kinds
def test_the_last_sector_of_a_file_that_ends_within_it_is_filled_with_zeroes(tmp_path: Path, kind: Kind) -> None:
    image = opened(image_of(tmp_path, b"x" * 1000), kind)
    assert image.size == 1024
    assert image.read(512, 512) == b"x" * 488 + bytes(24)
    assert not image.read_now(512, [memoryview(bytearray(512))])
    image.write(512, [b"y" * 512])
    assert image.read(0, 1024) == b"x" * 512 + b"y" * 512
    image.close()


@kinds
def test_a_file_that_became_shorter_is_an_error(tmp_path: Path, kind: Kind) -> None:
    path = image_of(tmp_path, PATTERN)
    image = opened(path, kind)
    os.truncate(path, 4096)
    assert image.read(0, 4096) == PATTERN[:4096]
    with pytest.raises(OSError, match="shorter"):
        image.read(4096, 4096)
    image.close()


@kinds
def test_discarded_space_is_given_back(tmp_path: Path, kind: Kind) -> None:
    path = image_of(tmp_path, os.urandom(1 << 20))
    image = opened(path, kind)
    before = path.stat().st_blocks
    image.discard(0, 1 << 19)
    assert path.stat().st_blocks <= before - 1000
    assert image.read(0, 4096) == bytes(4096)
    assert path.stat().st_size == 1 << 20
    image.close()


@kinds
@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_are_written_where_asked_and_nowhere_else(tmp_path: Path, kind: Kind, unmap: bool) -> None:
    image = opened(image_of(tmp_path, PATTERN), kind)
    image.zero(512, 8192, unmap=unmap)
    assert image.read(0, 16384) == PATTERN[:512] + bytes(8192) + PATTERN[8704:16384]
    image.close()


def test_what_is_in_the_page_cache_is_read_without_waiting(tmp_path: Path) -> None:
    image = opened(image_of(tmp_path, PATTERN))
    image.read(0, len(PATTERN))
    first, second = bytearray(512), bytearray(1024)
    assert image.read_now(512, [memoryview(first), memoryview(second)])
    assert bytes(first + second) == PATTERN[512:2048]
    image.close()


def test_what_is_not_in_the_page_cache_is_not_waited_for(tmp_path: Path) -> None:
    path = image_of(tmp_path, PATTERN)
    image = opened(path)
    os.fsync(image.fd)
    os.posix_fadvise(image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    room = bytearray(4096)
    assert not image.read_now(0, [memoryview(room)]) or room == PATTERN[:4096]
    assert image.read(0, 4096) == PATTERN[:4096]
    image.close()


def test_direct_images_read_nothing_without_waiting(tmp_path: Path) -> None:
    image = opened(image_of(tmp_path, PATTERN), DirectImage)
    assert not image.read_now(0, [memoryview(bytearray(512))])
    image.close()
    image.close()


@given(st.lists(st.binary(max_size=9), max_size=8), st.data())
def test_behind_gives_exactly_the_rest(views: Sequence[bytes], data: st.DataObject) -> None:
    whole = b"".join(views)
    done = data.draw(st.integers(0, len(whole)))
    rest = behind(views, done)
    assert b"".join(rest) == whole[done:]
    assert len(rest) <= len(views)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rwz"), st.integers(0, 47), st.integers(1, 20), st.integers(0, 255))))
@kinds
def test_an_image_is_what_a_bytearray_is(
    tmp_path_factory: pytest.TempPathFactory, kind: Kind, steps: list[tuple[str, int, int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"model-{kind.__name__}.img"
    model = bytearray(PATTERN[: 48 * 512 - 100])
    path.write_bytes(model)
    model += bytes(100)
    image = opened(path, kind)
    for action, sector, count, value in steps:
        start, end = sector * 512, min(48, sector + count) * 512
        if action == "w":
            model[start:end] = bytes([value]) * (end - start)
            image.write(start, [bytes([value]) * (end - start)])
        elif action == "z":
            model[start:end] = bytes(end - start)
            image.zero(start, end - start, unmap=bool(value & 1))
        assert image.read(start, end - start) == model[start:end]
    assert image.read(0, len(model)) == model
    image.close()


# -- opening -----------------------------------------------------------------------------------------------------------


def test_an_image_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DriveError, match=r"nothing\.img \(No such file"):
        open_image(DriveConfig(path=tmp_path / "nothing.img"))


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DriveError, match=r"not empty, found .*disk\.img"):
        open_image(DriveConfig(path=image_of(tmp_path, b"")))


@pytest.mark.parametrize("special", ["directory", "pipe"])
def test_what_is_no_disk_is_refused(tmp_path: Path, special: str) -> None:
    path = tmp_path / special
    if special == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(DriveError, match=f"a file or a block device, found .*{special}"):
        open_image(DriveConfig(path=path))


def test_a_read_only_drive_cannot_be_written_and_can_be_shared(tmp_path: Path) -> None:
    drive = DriveConfig(path=image_of(tmp_path, PATTERN), read_only=True)
    first, second = open_image(drive), open_image(drive)
    with pytest.raises(OSError, match="Bad file descriptor"):
        first.write(0, [b"x" * 512])
    first.close()
    second.close()


def test_a_drive_that_is_written_belongs_to_one(tmp_path: Path) -> None:
    drive = DriveConfig(path=image_of(tmp_path, PATTERN))
    image = open_image(drive)
    with pytest.raises(DriveBusy, match=r"disk\.img in use"):
        open_image(drive)
    image.close()
    open_image(drive).close()


def test_a_refused_image_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = image_of(tmp_path, b"")
    before = len(os.listdir("/proc/self/fd"))
    for cache in ("writeback", "none"):
        with pytest.raises(DriveError):
            open_image(DriveConfig(path=path, cache=cache))
    assert len(os.listdir("/proc/self/fd")) == before


def test_cache_none_goes_past_the_page_cache(tmp_path: Path) -> None:
    image = open_image(DriveConfig(path=image_of(tmp_path, PATTERN), cache="none"))
    assert isinstance(image, DirectImage)
    assert image.read(0, 4096) == PATTERN[:4096]
    image.close()
