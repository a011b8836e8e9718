"""What a snapshot keeps of drives: saved from overlays that were written to, restored for any number of VMs."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm.device_config import DriveConfig
from asyncvmm.errors import DriveError, ImageError, SnapshotDamaged, SnapshotError, SnapshotFailed, SnapshotMismatch
from asyncvmm.machine.base import DriveResource, Resources
from asyncvmm.storage.image import Image
from asyncvmm.storage.opening import open_image
from asyncvmm.storage.overlay import make_overlay
from asyncvmm.storage.snapshot import check_drives, restored_drives, save_drives
from tests.support.scarcity import descriptors_left

pytestmark = pytest.mark.anyio

SIZE = 1 << 20
CONTENT = b"base" * (SIZE // 4)
PAGE = 4096
FULL = 64 << 20
Saved = list[dict[str, Any]]


class Folder:
    """A snapshot's directory, as far as drives know it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "disks").mkdir(parents=True)

    def create(self, name: str) -> int:
        return os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)

    def open(self, name: str) -> int:
        try:
            return os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise SnapshotDamaged("snapshot", expected=f"a file {name}", found="none") from None


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "snapshot")


@pytest.fixture
def undo(temporary_directory: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def drive_on(base: Path, undo: ExitStack, *, for_qemu: bool = False) -> DriveResource:
    overlay = make_overlay(base, None, for_qemu=for_qemu)
    undo.callback(overlay.remove)
    config = DriveConfig(path=base, id="disk", overlay=True)
    return DriveResource(config, overlay.path or base, overlay.format, overlay)


def opened(drive: DriveResource, undo: ExitStack) -> Image:
    image = open_image(drive.config, drive.overlay)
    undo.callback(image.close)
    return image


def restored(saved: object, base: Path, folder: Folder, undo: ExitStack, **options: Any) -> DriveResource:
    config = DriveConfig(path=base, id="disk", overlay=True)
    (drive,) = restored_drives(saved, [config], folder.open, **options)
    if drive.overlay is not None:
        undo.callback(drive.overlay.remove)
    return drive


def write(image: Image, offset: int, data: bytes) -> None:
    image.write(offset, [data])


async def saved_of(drive: DriveResource, image: Image, folder: Folder) -> Saved:
    image.settle()
    return await save_drives(Resources(drives=(drive,)), folder)


# -- what was written is there again -----------------------------------------------------------------------------------


async def test_a_restored_drive_has_what_was_written_until_then_and_no_more(
    base: Path, folder: Folder, undo: ExitStack
) -> None:
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    write(image, 3 * PAGE + 512, b"before" * 100)
    saved = await saved_of(drive, image, folder)
    then = bytes(image.read(0, SIZE))
    write(image, 0, b"after!" * 100)
    assert bytes(opened(restored(saved, base, folder, undo), undo).read(0, SIZE)) == then
    assert bytes(opened(drive_on(base, undo), undo).read(0, SIZE)) == CONTENT, "the base is as it was"


async def test_clones_write_apart_from_each_other_and_from_what_is_saved(
    base: Path, folder: Folder, undo: ExitStack
) -> None:
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    write(image, 0, b"x" * PAGE)
    saved = await saved_of(drive, image, folder)
    first, second = (opened(restored(saved, base, folder, undo), undo) for _ in range(2))
    write(first, 100, b"first")
    write(second, 8 * PAGE, b"second")
    assert bytes(first.read(0, PAGE)) == b"x" * 100 + b"first" + b"x" * (PAGE - 105)
    assert bytes(second.read(0, PAGE)) == b"x" * PAGE
    assert bytes(first.read(8 * PAGE, 8)) == b"basebase"
    assert bytes(opened(restored(saved, base, folder, undo), undo).read(0, PAGE)) == b"x" * PAGE


async def test_a_restored_drive_is_saved_and_restored_again_and_again(
    base: Path, tmp_path: Path, undo: ExitStack
) -> None:
    drive = drive_on(base, undo)
    expected = bytearray(CONTENT)
    for generation in range(5):
        image = opened(drive, undo)
        for place in (generation * 10 * PAGE + 7, 100 * PAGE):
            data = bytes([generation + 65]) * 700
            write(image, place, data)
            expected[place : place + 700] = data
        folder = Folder(tmp_path / f"snapshot{generation}")
        saved = await saved_of(drive, image, folder)
        if generation:
            shutil.rmtree(tmp_path / f"snapshot{generation - 1}")
        drive = restored(saved, base, folder, undo)
    assert bytes(opened(drive, undo).read(0, SIZE)) == expected


async def test_a_clone_runs_on_when_the_snapshot_is_gone(base: Path, folder: Folder, undo: ExitStack) -> None:
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    write(image, PAGE, b"kept" * 1024)
    again = restored(await saved_of(drive, image, folder), base, folder, undo)
    shutil.rmtree(folder.path)
    assert bytes(opened(again, undo).read(PAGE, 8)) == b"keptkept"


async def test_an_overlay_with_a_name_is_saved_as_well(
    base: Path, folder: Folder, tmp_path: Path, undo: ExitStack
) -> None:
    overlay = make_overlay(base, tmp_path / "kept")
    config = DriveConfig(path=base, id="disk", overlay=tmp_path / "kept")
    drive = DriveResource(config, tmp_path / "kept", overlay.format, overlay)
    image = opened(drive, undo)
    write(image, 0, b"named")
    again = restored(await saved_of(drive, image, folder), base, folder, undo)
    write(opened(again, undo), 0, b"other")
    assert bytes(image.read(0, 5)) == b"named"
    assert again.overlay is not None
    assert again.overlay.path is None


async def test_what_is_saved_is_as_sparse_as_the_overlay(tmp_path: Path, folder: Folder, undo: ExitStack) -> None:
    base = tmp_path / "large"
    with base.open("wb") as file:
        file.truncate(1 << 30)
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    write(image, 1 << 29, b"little")
    saved = await saved_of(drive, image, folder)
    assert (folder.path / "disks" / "disk").stat().st_blocks * 512 < 1 << 19
    again = restored(saved, base, folder, undo)
    assert bytes(opened(again, undo).read(1 << 29, 6)) == b"little"


async def test_an_overlay_for_qemu_is_kept_though_its_name_is_gone(base: Path, folder: Folder, undo: ExitStack) -> None:
    drive = drive_on(base, undo, for_qemu=True)
    assert drive.overlay is not None
    content = drive.path.read_bytes()
    drive.overlay.drop_name()
    saved = await save_drives(Resources(drives=(drive,)), folder)
    again = restored(saved, base, folder, undo, for_qemu=True)
    assert again.path.read_bytes() == content
    assert (again.path, again.format) == (again.overlay and again.overlay.path, drive.format)


async def test_a_drive_that_is_only_read_is_where_it_is(base: Path, folder: Folder) -> None:
    config = DriveConfig(path=base, id="disk", read_only=True)
    saved = await save_drives(Resources(drives=(DriveResource(config, base),)), folder)
    assert restored_drives(saved, [config], folder.open) == [DriveResource(config, base)]
    assert not os.listdir(folder.path / "disks")


# -- what is refused ---------------------------------------------------------------------------------------------------


async def test_an_image_that_the_guest_writes_is_refused_with_what_to_do(base: Path, folder: Folder) -> None:
    resources = Resources(drives=(DriveResource(DriveConfig(path=base, id="disk"), base),))
    with pytest.raises(SnapshotFailed, match=r"overlay=True or read_only=True.*drive disk"):
        await save_drives(resources, folder)
    with pytest.raises(SnapshotFailed):
        check_drives(resources)


@pytest.fixture
def saved(base: Path, folder: Folder, undo: ExitStack) -> Saved:
    drive = drive_on(base, undo)
    return anyio.run(saved_of, drive, opened(drive, undo), folder)


def test_a_base_that_was_changed_meanwhile_is_refused(
    saved: Saved, base: Path, folder: Folder, undo: ExitStack
) -> None:
    base.write_bytes(base.read_bytes())
    with pytest.raises(SnapshotMismatch, match="changed"):
        restored(saved, base, folder, undo)
    base.unlink()
    with pytest.raises(SnapshotMismatch, match="No such file"):
        restored(saved, base, folder, undo)


def test_a_base_that_cannot_be_opened_now_is_not_taken_for_another(
    saved: Saved, base: Path, folder: Folder, undo: ExitStack
) -> None:
    with descriptors_left(0), pytest.raises(DriveError, match="Too many open files"):
        restored(saved, base, folder, undo)


def test_a_read_only_image_of_another_size_is_refused(saved: Saved, base: Path, folder: Folder) -> None:
    saved[0]["overlay"] = None
    with base.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SnapshotMismatch, match=f"{SIZE + 4} bytes"):
        restored_drives(saved, [DriveConfig(path=base, id="disk", read_only=True)], folder.open)


@pytest.mark.parametrize(
    ("drives", "expected"),
    [
        ((), SnapshotDamaged),
        (({"id": "other", "overlay": True},), SnapshotMismatch),
        (({"id": "disk", "read_only": True},), SnapshotMismatch),
        (({"id": "disk", "overlay": True}, {"id": "second", "overlay": True}), SnapshotMismatch),
    ],
)
def test_other_drives_than_those_saved_are_refused(
    saved: Saved, base: Path, folder: Folder, drives: tuple[dict[str, Any], ...], expected: type[SnapshotError]
) -> None:
    with pytest.raises(expected):
        restored_drives(saved, [DriveConfig(path=base, **drive) for drive in drives], folder.open)


def test_what_is_missing_is_damage(saved: Saved, base: Path, folder: Folder, undo: ExitStack) -> None:
    (folder.path / "disks" / "disk").unlink()
    with pytest.raises(SnapshotDamaged, match="disks/disk"):
        restored(saved, base, folder, undo)


@pytest.mark.parametrize("size", [0, 100, 5000, 9000])
def test_what_was_cut_off_is_damage(saved: Saved, base: Path, folder: Folder, undo: ExitStack, size: int) -> None:
    os.truncate(folder.path / "disks" / "disk", size)
    with pytest.raises(SnapshotDamaged):
        restored(saved, base, folder, undo)


def test_a_map_that_is_none_is_damage(saved: Saved, base: Path, folder: Folder, undo: ExitStack) -> None:
    with (folder.path / "disks" / "disk").open("r+b") as file:
        file.seek(PAGE)
        file.write(b"\7")
    with pytest.raises(ImageError, match="zeroes and ones"):
        opened(restored(saved, base, folder, undo), undo)


@pytest.mark.parametrize("value", [None, 7, "text", [], {}, {"id": 1}, True, -1, 2**70, "../../etc/passwd", "a\0b"])
@pytest.mark.parametrize("place", ["all", "entry", "id", "path", "size", "mtime_ns", "overlay"])
def test_nonsense_is_refused(
    saved: Saved, base: Path, folder: Folder, undo: ExitStack, place: str, value: object
) -> None:
    plain: Any = copy.deepcopy(saved)
    if place == "all":
        plain = value
    elif place == "entry":
        plain[0] = value
    elif plain[0][place] == value or (place, value) == ("path", "text"):
        return
    else:
        plain[0][place] = value
    if (place, value) in (("path", "../../etc/passwd"),):
        restored(plain, base, folder, undo)  # for people to read: the configuration says where it is
        return
    with pytest.raises((SnapshotDamaged, SnapshotMismatch)):
        restored(plain, base, folder, undo)


# -- no room, and nobody who wants it any more -------------------------------------------------------------------------


@pytest.mark.requires("root", "mount-namespaces")
async def test_a_full_disk_is_told_of(base: Path, small_disk: Path, undo: ExitStack) -> None:
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    write(image, 0, CONTENT)
    full = Folder(small_disk / "full")
    with pytest.raises(SnapshotFailed, match="No space left"):
        await saved_of(drive, image, full)
    (full.path / "disks" / "disk").unlink()
    image.discard(0, SIZE - 4 * PAGE)
    saved = await saved_of(drive, image, full)
    assert bytes(opened(restored(saved, base, full, undo), undo).read(SIZE - PAGE, PAGE)) == CONTENT[:PAGE]


def fill(image: Image) -> None:
    for place in range(0, FULL, SIZE):
        write(image, place, CONTENT)
    image.settle()


async def test_a_copy_that_nobody_wants_any_more_ends(tmp_path: Path, folder: Folder, undo: ExitStack) -> None:
    base = tmp_path / "large"
    with base.open("wb") as file:
        file.truncate(4 << 30)
    drive = drive_on(base, undo)
    image = opened(drive, undo)
    await anyio.to_thread.run_sync(fill, image)
    begun = anyio.Event()

    class Slow(Folder):
        def create(self, name: str) -> int:
            anyio.from_thread.run_sync(begun.set)
            return super().create(name)

    slow = Slow(tmp_path / "slow")
    async with anyio.create_task_group() as tasks:

        async def save() -> None:
            await save_drives(Resources(drives=(drive,)), slow)

        tasks.start_soon(save)
        await begun.wait()
        tasks.cancel_scope.cancel()
    assert (slow.path / "disks" / "disk").stat().st_blocks * 512 < FULL


def test_no_room_for_a_clone_is_told_of(
    saved: Saved, base: Path, folder: Folder, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nosuch")
    with pytest.raises(DriveError, match="nosuch"):
        restored(saved, base, folder, undo)
