"""Copy-on-write overlays: what one VM writes to while its base stays as it is, for clones by the hundred.

Which kind it becomes, in this order:

reflink  a copy that shares the base's blocks in the file system (Btrfs, XFS): a raw image like any other.
mapped   for the KVM machine: a sparse file and a map of the blocks in it (mapped.py), made in the same short time
         whatever the size of the base.
qcow2    for the QEMU machine, which reads no format of ours.

An overlay without a path of its own dies with its VM: for the KVM machine it never has a name, for QEMU only until it
is open. So nothing is left behind however this process ends.

A clone's overlay begins with what a snapshot has kept (storage/snapshot.py): a mapped one lies over the saved one and
takes none of its bytes, the others are copies, which share blocks where the file system can.

An image's format is never guessed: what a guest wrote into a raw image must not decide which files the host opens.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

import attrs

from asyncvmm.errors import DriveError, ImageError
from asyncvmm.storage.copying import copy_file
from asyncvmm.storage.lock import lock_image
from asyncvmm.storage.overlay_file import MAGIC, MAP_AT, check_header, header_for, parse_header
from asyncvmm.storage.qcow2 import MAGIC as QCOW2_MAGIC
from asyncvmm.storage.qcow2 import base_of, empty_overlay
from asyncvmm.storage.ranges import clone_file, size_of

How = Literal["reflink", "mapped", "qcow2", "kept", "saved"]
Format = Literal["raw", "mapped", "qcow2"]


@attrs.define(kw_only=True, eq=False)
class Overlay:
    """One overlay. how: how it came to be; ``kept`` if it was there before, ``saved`` if a snapshot had it. format:
    what the file is. path: its name, None if it has none. fd: one that is temporary, open; under: a saved one of the
    same base, open, over which this one lies (-1: none). Both belong to this record."""

    base: Path
    how: How
    format: Format
    path: Path | None = None
    temporary: bool = False
    fd: int = -1
    under: int = -1

    def open_file(self, mode: int = os.O_RDWR) -> int:
        """The file, the caller's to close; of one that is temporary ``mode`` is as it is. Raises OSError."""
        if self.fd >= 0:
            return os.dup(self.fd)
        if self.path is None:
            raise OSError(errno.EBADF, "the overlay is gone")
        return os.open(self.path, mode | os.O_CLOEXEC)

    def remove(self) -> None:
        """Let go of it; one that is temporary is gone then. May be called again."""
        for fd in (self.fd, self.under):
            if fd >= 0:
                os.close(fd)
        self.fd = self.under = -1
        self.drop_name()

    def drop_name(self) -> None:
        """It is open: one that is temporary needs no name any more. May be called again."""
        if self.temporary and self.path is not None:
            with suppress(FileNotFoundError):
                self.path.unlink()


def make_overlay(base: Path, target: Path | None, *, for_qemu: bool = False, directory: Path | None = None) -> Overlay:
    """An overlay of ``base`` at ``target``, or one that dies with the VM (None), in ``directory`` (None: TMPDIR).

    A ``target`` that is there must be an overlay of this base and is taken up again. For a worker thread: it may wait
    for the disk. Raises DriveError for files that cannot be used, DriveBusy for a base that somebody writes, ImageError
    for a base or target that is none.
    """
    try:
        size = _size_of_base(base)
        if target is None:
            place = Path(tempfile.gettempdir()) if directory is None else directory
            return _new_for_qemu(base, size, place) if for_qemu else _new_without_name(base, size, place)
        if os.path.lexists(target):
            return _kept(base, size, target, for_qemu)
        return _new(base, size, target, for_qemu, temporary=False)
    except OSError as error:
        what = error.filename or target or base
        raise DriveError("overlay", expected="files to work with", found=f"{what} ({error.strerror})") from None


def _size_of_base(base: Path) -> int:
    fd = os.open(base, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        size = size_of(fd) if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else 0
        lock_image(fd, base, writer=False)  # a look only: who opens the overlay locks its base for good
    finally:
        os.close(fd)
    if not size:
        raise ImageError("overlay's base", expected="an image file or a block device, not empty", found=str(base))
    return size


# -- new ones ----------------------------------------------------------------------------------------------------------


def _new_without_name(base: Path, size: int, directory: Path) -> Overlay:
    """Sharing blocks needs the base's own file system; else it goes where temporary files go."""
    with suppress(OSError):
        fd = _nameless(base.resolve().parent)
        if _reflink(base, fd):
            return Overlay(base=base, how="reflink", format="raw", temporary=True, fd=fd)
        os.close(fd)
    fd = _nameless(directory)
    try:
        _lay_out(base, size, fd)
    except BaseException:
        os.close(fd)
        raise
    return Overlay(base=base, how="mapped", format="mapped", temporary=True, fd=fd)


def _nameless(directory: Path) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    return fd


def _new_for_qemu(base: Path, size: int, directory: Path) -> Overlay:
    return _new(base, size, _draw_name(directory), True, temporary=True)


def _draw_name(directory: Path) -> Path:
    return directory / f"overlay-{secrets.token_hex(8)}"


def _new(base: Path, size: int, target: Path, for_qemu: bool, *, temporary: bool) -> Overlay:
    fd = _create(target)
    try:
        how = _fill(base, size, fd, for_qemu)
    except BaseException:
        target.unlink()
        os.close(fd)
        raise
    form: Format = "raw" if how == "reflink" else how
    if not temporary:
        os.close(fd)
        fd = -1
    return Overlay(base=base, how=how, format=form, path=target, temporary=temporary, fd=fd)


def _create(target: Path) -> int:
    return os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _fill(base: Path, size: int, fd: int, for_qemu: bool) -> Literal["reflink", "mapped", "qcow2"]:
    if _reflink(base, fd):
        return "reflink"
    if for_qemu:
        file_size, parts = empty_overlay(base, size)
        os.ftruncate(fd, file_size)
        for place, data in parts.items():
            os.pwrite(fd, data, place)
        return "qcow2"
    _lay_out(base, size, fd)
    return "mapped"


def _reflink(base: Path, fd: int) -> bool:
    try:
        source = os.open(base, os.O_RDONLY | os.O_CLOEXEC)
        try:
            clone_file(source, fd)
        finally:
            os.close(source)
    except OSError:  # another file system, or one that shares no blocks: there are other ways
        return False
    return True


def _lay_out(base: Path, size: int, fd: int) -> None:
    """Make it an overlay's file, with nothing of its own yet."""
    header = header_for(base, size)
    os.pwrite(fd, header.pack(), 0)
    os.ftruncate(fd, header.file_size)


# -- what a snapshot had -----------------------------------------------------------------------------------------------


def overlay_of_saved(base: Path, saved: int, form: Format, *, for_qemu: bool, directory: Path | None = None) -> Overlay:
    """A temporary overlay that begins with what ``saved`` holds: an overlay's file of ``base`` in the format ``form``,
    open, the caller's. For a worker thread: what cannot share blocks is copied. Raises DriveError, ImageError.
    """
    place = Path(tempfile.gettempdir()) if directory is None else directory
    try:
        if form == "mapped" and not for_qemu:
            return _over_saved(base, saved, place)
        return _copy_of_saved(base, saved, form, place, for_qemu)
    except OSError as error:
        raise DriveError("overlay", expected="room for a copy", found=f"{place} ({error.strerror})") from None


def _over_saved(base: Path, saved: int, directory: Path) -> Overlay:
    header = parse_header(os.pread(saved, MAP_AT, 0))
    check_header(header, header_for(base, _size_of_base(base)), base, os.fstat(saved).st_size)
    fd = _nameless(directory)
    try:
        _lay_out(base, header.size, fd)
        under = os.dup(saved)
    except BaseException:
        os.close(fd)
        raise
    return Overlay(base=base, how="saved", format="mapped", temporary=True, fd=fd, under=under)


def _copy_of_saved(base: Path, saved: int, form: Format, directory: Path, named: bool) -> Overlay:
    if not named and (sharing := _sharing(saved)) >= 0:
        return Overlay(base=base, how="saved", format=form, temporary=True, fd=sharing)
    path = _draw_name(directory) if named else None
    fd = _nameless(directory) if path is None else _create(path)
    overlay = Overlay(base=base, how="saved", format=form, path=path, temporary=True, fd=fd)
    try:
        copy_file(saved, fd)
    except BaseException:
        overlay.remove()
        raise
    return overlay


def _sharing(saved: int) -> int:
    """A file without a name beside the saved one, sharing its blocks; -1 where that cannot be."""
    try:
        fd = _nameless(Path(os.readlink(f"/proc/self/fd/{saved}")).parent)
    except OSError:
        return -1
    try:
        clone_file(saved, fd)
    except OSError:
        os.close(fd)
        return -1
    return fd


# -- those that are there already --------------------------------------------------------------------------------------


def _kept(base: Path, size: int, target: Path, for_qemu: bool) -> Overlay:
    fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        found = _format_of(os.pread(fd, MAP_AT, 0), os.fstat(fd).st_size, base, size, target) if regular else None
    finally:
        os.close(fd)
    if found is None or target.samefile(base):
        raise ImageError("overlay", expected=f"a new file, or an overlay of {base}", found=str(target))
    if found == ("mapped" if for_qemu else "qcow2"):
        machine = "QEMU" if for_qemu else "KVM"
        raise ImageError("overlay", expected=f"one that the {machine} machine can use", found=f"{target} ({found})")
    return Overlay(base=base, how="kept", format=found, path=target)


def _format_of(head: bytes, file_size: int, base: Path, size: int, target: Path) -> Format | None:
    """A file of the base's very size is a raw copy: those of other formats are larger, or say what they are in vain."""
    if file_size == size:
        return None if head.startswith(QCOW2_MAGIC) else "raw"
    if head.startswith(MAGIC):
        check_header(parse_header(head), header_for(base, size), target, file_size)
        return "mapped"
    if head.startswith(QCOW2_MAGIC):
        name, _ = base_of(head)
        return "qcow2" if name == os.fsencode(os.path.realpath(base)) else None
    return None
