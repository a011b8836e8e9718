"""Writes a file whole or not at all: beside its place first, then renamed over it."""

from __future__ import annotations

import os
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path

from asyncvmm.errors import HostError

STDOUT = "-"


def write_whole(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``; ``-`` is stdout. What it held stays if that fails. Raises HostError.

    A file that is there keeps its mode, a link goes on pointing to it. Devices and pipes are written to as they are.
    """
    if str(path) == STDOUT:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        place = Path(os.path.realpath(path))
        mode = _mode(place)
        if mode is None or stat.S_ISREG(mode):
            replace_file(place, data)
        else:
            place.write_bytes(data)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise HostError("output", expected="a file that can be written", found=f"{path} ({reason})") from None


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def replace_file(path: Path, data: bytes) -> None:
    """Put a file that holds ``data`` in the place of ``path``, a file or nothing; its mode stays. Raises OSError."""
    mode = _mode(path)
    beside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
