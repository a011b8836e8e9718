"""Opening what a snapshot's directory holds: by name in that directory, no link followed, and plain files only."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from asyncvmm.errors import SnapshotDamaged, SnapshotError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

_AMISS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.EISDIR, errno.ENODEV)
"""What is there is not what a snapshot has there; any other error is the host's."""


def open_snapshot(path: Path) -> int:
    """A snapshot's directory. Raises SnapshotError where there is none."""
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        found = "symbolic links that lead nowhere" if error.errno == errno.ELOOP else error.strerror
        raise SnapshotError(f"snapshot {path}", expected="a directory", found=found) from None
    except ValueError as error:
        raise SnapshotError(f"snapshot {path}", expected="a directory", found=str(error)) from None


def open_base(directory: int, path: str, shown: Path) -> int:
    """The directory at ``path``, relative to an open one. Raises SnapshotDamaged or SnapshotError."""
    try:
        return os.open(path, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    except (OSError, ValueError) as error:
        raise _refusal("base of a difference", f"a snapshot at {shown}", error) from None


def open_file(directory: int, name: str, shown: Path) -> int:
    """A plain file, to read. ``name`` has been checked (manifest.is_name). Raises SnapshotDamaged or SnapshotError."""
    what = str(shown / name)
    try:
        fd = _open_beneath(directory, name)
    except OSError as error:
        raise _refusal(what, "a file", error) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SnapshotDamaged(what, expected="a plain file", found="another kind of file")
    return fd


def read_file(directory: int, name: str, shown: Path, most: int) -> bytes:
    """A plain file's content. Raises SnapshotDamaged, for one of more than ``most`` bytes too, or SnapshotError."""
    fd = open_file(directory, name, shown)
    try:
        size = os.fstat(fd).st_size
        if size > most:
            raise SnapshotDamaged(str(shown / name), expected=f"at most {most} bytes", found=f"{size} bytes")
        with open(fd, "rb", closefd=False) as file:
            return file.read(size)
    except OSError as error:
        raise _refusal(str(shown / name), "a file that can be read", error) from None
    finally:
        os.close(fd)


def _open_beneath(directory: int, name: str) -> int:
    folder, _, last = name.rpartition("/")
    if not folder:
        return os.open(last, _FILE, dir_fd=directory)
    inner = os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        return os.open(last, _FILE, dir_fd=inner)
    finally:
        os.close(inner)


def _refusal(what: str, expected: str, error: OSError | ValueError) -> SnapshotError:
    if not isinstance(error, OSError):
        return SnapshotDamaged(what, expected=expected, found=str(error))
    kind = SnapshotDamaged if error.errno in _AMISS else SnapshotError
    found = "a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror
    return kind(what, expected=expected, found=found)
