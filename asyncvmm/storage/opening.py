"""Opens what a drive's configuration asks for: an image, locked, ready to be read and written. It blocks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asyncvmm.device_config import CacheMode, DriveConfig
from asyncvmm.errors import DriveBusy, DriveError, ImageError
from asyncvmm.storage.block_map import BlockMap
from asyncvmm.storage.direct import DirectImage
from asyncvmm.storage.image import Image
from asyncvmm.storage.lock import lock_image
from asyncvmm.storage.mapped import MappedImage
from asyncvmm.storage.overlay import Overlay
from asyncvmm.storage.overlay_file import MAP_AT, OverlayHeader, check_header, header_for, parse_header
from asyncvmm.storage.ranges import size_of
from asyncvmm.storage.raw import RawImage


def open_image(drive: DriveConfig, overlay: Overlay | None = None) -> Image:
    """The drive's image; ``overlay`` is what ``make_overlay`` made for it, and this image's from now on.

    Raises DriveError, DriveBusy, ImageError, each with the drive's id and the path.
    """
    with of_drive(drive):
        return _open_any(drive, overlay)


@contextmanager
def of_drive(drive: DriveConfig) -> Iterator[None]:
    """Errors that come through here say which drive they are about, if it has an id."""
    try:
        yield
    except (DriveError, ImageError) as error:
        if drive.id:
            what = error.what.removeprefix("drive")
            error.what = f"drive {drive.id}: {what}" if what else f"drive {drive.id}"
        raise


def _open_any(drive: DriveConfig, overlay: Overlay | None) -> Image:
    path = drive.path if overlay is None else overlay.path or overlay.base
    try:
        with ExitStack() as stack:
            image = _open(drive, overlay, stack)
            stack.pop_all()
            return image
    except OSError as error:
        raise DriveError("drive", expected="an image that can be opened", found=f"{path} ({error.strerror})") from None


def _open(drive: DriveConfig, overlay: Overlay | None, stack: ExitStack) -> Image:
    if overlay is None:
        return _raw(_open_file(drive.path, stack, writer=not drive.read_only), drive.path, drive.cache)
    fd = overlay.open_file()
    stack.callback(os.close, fd)
    name = overlay.path or overlay.base
    if overlay.path is not None:
        lock_image(fd, name, writer=True)
    if overlay.format == "raw":
        return _raw(fd, name, drive.cache)
    if overlay.format == "mapped":
        return _mapped(overlay, fd, drive.cache, stack)
    raise DriveError("drive", expected="a raw image or an overlay of ours", found=f"{name} ({overlay.format})")


def _open_file(path: Path, stack: ExitStack, *, writer: bool) -> int:
    """Open and lock an image. A block device is opened exclusively to be written: not while it is mounted."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise DriveError("drive", expected="a file or a block device", found=str(path))
    flags = os.O_RDWR if writer else os.O_RDONLY
    if writer and stat.S_ISBLK(mode):
        flags |= os.O_EXCL
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise DriveBusy("drive", expected="a device nobody else uses", found=f"{path} in use") from None
    stack.callback(os.close, fd)
    lock_image(fd, path, writer=writer)
    return fd


def _raw(fd: int, path: Path, cache: CacheMode, start: int = 0, size: int | None = None) -> RawImage:
    """The image of a file that is open, its owner from now on."""
    size = size_of(fd) if size is None else size
    if not size:
        raise DriveError("drive", expected="an image that is not empty", found=str(path))
    if cache != "none":
        return RawImage(fd, size, start=start)
    try:
        return DirectImage(fd, size, start=start)
    except OSError as error:
        wanted = 'a file system that has O_DIRECT, for cache="none"'
        raise DriveError("drive", expected=wanted, found=f"{path} ({error.strerror})") from None


def _mapped(overlay: Overlay, fd: int, cache: CacheMode, stack: ExitStack) -> MappedImage:
    """The base through the page cache, which its clones share; the blocks of its own as ``cache`` says."""
    base_fd = _open_file(overlay.base, stack, writer=False)
    name = overlay.path or overlay.base
    header = header_for(overlay.base, size_of(base_fd))
    base: Image = RawImage(base_fd, header.size)
    if overlay.under >= 0:
        under = os.dup(overlay.under)
        stack.callback(os.close, under)
        blocks = _blocks_of(under, header, name, stack)
        base = MappedImage(base, RawImage(under, header.size, start=header.data_at), blocks, keep=False)
    blocks = _blocks_of(fd, header, name, stack)
    top = _raw(fd, name, cache, start=header.data_at, size=header.size)
    return MappedImage(base, top, blocks, keep=not overlay.temporary)


def _blocks_of(fd: int, expected: OverlayHeader, name: Path, stack: ExitStack) -> BlockMap:
    """Of an overlay that has the header it should have."""
    check_header(parse_header(os.pread(fd, MAP_AT, 0)), expected, name, size_of(fd))
    blocks = BlockMap(expected.size, expected.block)
    stack.callback(blocks.close)
    blocks.load(fd, MAP_AT)
    return blocks
