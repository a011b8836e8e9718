"""What a snapshot keeps of a VM's drives, and the drives of a VM that is restored from it.

overlay    a copy of the overlay's file as it stood at the pause; a clone writes to an overlay of its own over it
read-only  where the image is

An image that the guest writes without an overlay cannot be kept: it would change under the snapshot. Images and bases
are not copied. They must be what they were, by size and time of change: a guest has parts of them in its memory.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, get_args

import attrs

from asyncvmm.config import can_be_path
from asyncvmm.device_config import DriveConfig
from asyncvmm.errors import ConfigError, DriveError, SnapshotDamaged, SnapshotFailed, SnapshotMismatch
from asyncvmm.machine.base import DriveResource, Resources
from asyncvmm.machine.threads import run_in_thread
from asyncvmm.machine.waiting import wait_out
from asyncvmm.storage.block_map import BlockMap
from asyncvmm.storage.copying import Unwanted, copy_file, copy_range
from asyncvmm.storage.overlay import Format, Overlay, overlay_of_saved
from asyncvmm.storage.overlay_file import MAP_AT, parse_header
from asyncvmm.storage.ranges import size_of

FOLDER: Final = "disks"
"""Where in a snapshot's directory the overlays lie, each by its drive's id."""

_MOST_SIZE: Final = (1 << 63) - 1


class NewFiles(Protocol):
    """A snapshot's directory that is being made."""

    def create(self, name: str) -> int:
        """A new file in it, open for reading and writing, the caller's to close. Raises SnapshotFailed."""
        ...


OpenFile = Callable[[str], int]
"""Opens a file of a snapshot by its name, to be read; the caller closes it. Raises SnapshotDamaged."""


@attrs.frozen(kw_only=True)
class SavedDrive:
    """One drive of a snapshot. path, size, mtime_ns: of the image or the overlay's base. overlay: the format of what
    the snapshot has of the overlay, None for a drive without."""

    id: str
    path: str
    size: int
    mtime_ns: int
    overlay: Format | None

    @property
    def file(self) -> str:
        """The overlay's file in the snapshot's directory."""
        return f"{FOLDER}/{self.id}"

    @classmethod
    def from_plain(cls, plain: object) -> SavedDrive:
        """Raises SnapshotDamaged."""
        names = {field.name for field in attrs.fields(cls)}
        if not isinstance(plain, Mapping) or set(plain) != names:
            raise _damaged(f"a drive's {', '.join(sorted(names))}", plain)
        drive = cls(**plain)
        if not isinstance(drive.id, str) or not isinstance(drive.path, str) or not can_be_path(drive.path):
            raise _damaged("a name and a path", (drive.id, drive.path))
        for number in (drive.size, drive.mtime_ns):
            if isinstance(number, bool) or not isinstance(number, int) or abs(number) > _MOST_SIZE:
                raise _damaged("a size and a time", (drive.size, drive.mtime_ns))
        if drive.overlay not in (None, *get_args(Format)):
            raise _damaged("an overlay's format", drive.overlay)
        return drive


def _damaged(expected: str, found: object) -> SnapshotDamaged:
    return SnapshotDamaged("saved drives", expected=expected, found=repr(found)[:200])


# -- save --------------------------------------------------------------------------------------------------------------


async def save_drives(resources: Resources, files: NewFiles) -> list[dict[str, Any]]:
    """Copy what the drives of a paused VM hold to ``files``; what the manifest is to say of them.

    The machine has saved its devices before: its disks are idle then, and overlays' files whole. Cancelled, it leaves
    what it has written to who made ``files``. Raises SnapshotFailed.
    """
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise Unwanted

    def work() -> list[dict[str, Any]]:
        return [attrs.asdict(_save(drive, files, check)) for drive in resources.drives]

    check_drives(resources)
    call = asyncio.ensure_future(run_in_thread(work))
    try:
        await asyncio.wait([call])
    except asyncio.CancelledError:
        unwanted.set()
        await wait_out(asyncio.ensure_future(asyncio.wait([call])))
        call.exception()
        raise
    try:
        return call.result()
    except OSError as error:
        raise SnapshotFailed("saving drives", expected="room for their overlays", found=error.strerror) from None


def check_drives(resources: Resources) -> None:
    """Whether these drives can be in a snapshot; of use before anything is paused. Raises SnapshotFailed."""
    for drive in resources.drives:
        if drive.overlay is None and not drive.config.read_only:
            raise _written(drive.config)


def check_drive_configs(drives: Sequence[DriveConfig]) -> None:
    """The same of drives for which nothing is made ready yet. Raises SnapshotFailed."""
    for drive in drives:
        if drive.overlay is False and not drive.read_only:
            raise _written(drive)


def _written(drive: DriveConfig) -> SnapshotFailed:
    return SnapshotFailed(
        "saving drives",
        expected="overlay=True or read_only=True, so that the image stays as it is",
        found=f"drive {drive.id}, which writes to {drive.path}",
    )


def _save(drive: DriveResource, files: NewFiles, check: Callable[[], None]) -> SavedDrive:
    """On a worker thread. Raises OSError, SnapshotFailed."""
    overlay, base = drive.overlay, drive.config.path
    size, mtime_ns = _facts(base)
    saved = SavedDrive(
        id=drive.config.id or "drive",
        path=os.path.realpath(base),
        size=size,
        mtime_ns=mtime_ns,
        overlay=None if overlay is None else overlay.format,
    )
    if overlay is not None:
        target = files.create(saved.file)
        try:
            _save_overlay(overlay, target, check)
        finally:
            os.close(target)
    return saved


def _facts(path: Path) -> tuple[int, int]:
    """Bytes, and when it was changed the last time; 0 for a device, whose node does not know. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        return size_of(fd), 0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns
    finally:
        os.close(fd)


def _save_overlay(overlay: Overlay, target: int, check: Callable[[], None]) -> None:
    source = overlay.open_file(os.O_RDONLY)
    try:
        if overlay.under < 0:
            copy_file(source, target, check)
        else:
            copy_file(overlay.under, target, check)
            _lay_over(source, target, check)
    finally:
        os.close(source)


def _lay_over(source: int, target: int, check: Callable[[], None]) -> None:
    """Put what one overlay has of its own into another of the same base."""
    header = parse_header(os.pread(source, MAP_AT, 0))
    own, both = BlockMap(header.size, header.block), BlockMap(header.size, header.block)
    try:
        own.load(source, MAP_AT)
        both.load(target, MAP_AT)
        for is_own, place, size in own.runs(0, header.size):
            if is_own:
                copy_range(source, target, header.data_at + place, header.data_at + place + size, check)
                both.mark(place // header.block, (place + size - 1) // header.block)
        both.save(target, MAP_AT)
    finally:
        own.close()
        both.close()


# -- restore -----------------------------------------------------------------------------------------------------------


def restored_drives(
    saved: object, drives: Sequence[DriveConfig], open_file: OpenFile, *, for_qemu: bool = False
) -> list[DriveResource]:
    """The drives of one VM that is restored: those of ``drives``, as ``saved`` by ``save_drives``.

    Each overlay is a new one, which dies with its VM and begins with what was saved; who calls this removes it. For a
    worker thread. Raises SnapshotDamaged, SnapshotMismatch (other drives, another image), DriveError, DriveBusy.
    """
    if not isinstance(saved, list) or len(saved) > len(drives):
        raise _damaged(f"a list of {len(drives)}", saved)
    records = [SavedDrive.from_plain(plain) for plain in saved]
    if (found := [record.id for record in records]) != (expected := [drive.id for drive in drives]):
        raise SnapshotMismatch("drives", expected=expected, found=found)
    made: list[DriveResource] = []
    try:
        for drive, record in zip(drives, records, strict=True):
            made.append(_restore(drive, record, open_file, for_qemu))
    except BaseException:
        for resource in made:
            if resource.overlay is not None:
                resource.overlay.remove()
        raise
    return made


def _restore(drive: DriveConfig, record: SavedDrive, open_file: OpenFile, for_qemu: bool) -> DriveResource:
    _check_image(drive.path, record)
    if drive.read_only != (record.overlay is None):
        expected = "an overlay" if record.overlay else "read_only"
        raise SnapshotMismatch(f"drive {drive.id}", expected=expected, found=f"read_only={drive.read_only}")
    if record.overlay is None:
        return DriveResource(drive, drive.path)
    if record.overlay == ("mapped" if for_qemu else "qcow2"):
        machine = "QEMU" if for_qemu else "KVM"
        raise SnapshotMismatch(f"drive {drive.id}", expected=f"an overlay for {machine}", found=record.overlay)
    saved = open_file(record.file)
    try:
        overlay = overlay_of_saved(drive.path, saved, record.overlay, for_qemu=for_qemu)
    except ConfigError as error:
        raise SnapshotDamaged(f"drive {drive.id}", expected=error.expected, found=error.found) from None
    finally:
        os.close(saved)
    return DriveResource(drive, overlay.path or drive.path, overlay.format, overlay)


def _check_image(path: Path, record: SavedDrive) -> None:
    try:
        facts = _facts(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SnapshotMismatch("drive's image", expected=record.path, found=error.strerror) from None
    except OSError as error:
        found = f"{path} ({error.strerror})"
        raise DriveError("drive's image", expected="a file that can be opened", found=found) from None
    if facts != (record.size, record.mtime_ns):
        raise SnapshotMismatch(
            "drive's image",
            expected=f"{record.path} as it was: {record.size} bytes, changed {record.mtime_ns}",
            found=f"{path}: {facts[0]} bytes, changed {facts[1]}",
        )
