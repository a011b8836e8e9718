"""Sources: the files, pipes and stdin that JSON lines come from, read without holding up the loop.

Pipes and the like are waited for on the loop, so that a wait can be cancelled; what cannot be waited for (files of a
disk) is read in worker threads. A source that is followed is looked at again and again: what was appended is read, and
a file that was cut short or replaced is read from its start.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread

from asyncvmm.errors import ConfigError

POLL_S = 0.2
"""Seconds between two looks at a file that is followed."""

CHUNK = 1 << 17
"""Bytes that are read at a time: few enough lines to keep the loop responsive."""


class Source:
    """What ``path`` names, ``-`` being stdin, opened at once. Raises ConfigError if it cannot be read."""

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
        self._path = None if path == "-" else Path(path)
        self._fd = _open(path)
        self._waits = not stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._position = 0

    async def chunks(self, *, follow: bool = False) -> AsyncIterator[bytes]:
        """Its bytes to the end; if it is followed, without end. After an empty chunk the file starts anew."""
        starts_anew = False
        while True:
            chunk = await self._read()
            self._position += len(chunk)
            if chunk:
                yield chunk
            elif not follow or self._path is None:
                return
            elif starts_anew:  # and what was written to the old one before that has been read
                self._start_anew()
                starts_anew = False
                yield b""
            else:
                await anyio.sleep(POLL_S)
                starts_anew = self._is_another(self._path)

    def close(self) -> None:
        """Free it. May be called again."""
        if self._fd >= 0 and self._path is not None:
            os.close(self._fd)
        self._fd = -1

    async def _read(self) -> bytes:
        if self._waits:
            try:
                await anyio.wait_readable(self._fd)
            except OSError:  # what epoll does not take is never waited for, either
                self._waits = False
        if self._waits:
            return self._read_now()
        return await anyio.to_thread.run_sync(self._read_now)

    def _read_now(self) -> bytes:
        try:
            return os.read(self._fd, CHUNK)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ConfigError("metrics", expected="a readable file", found=f"{self.name} ({error.strerror})") from None

    def _is_another(self, path: Path) -> bool:
        try:
            now, ours = os.stat(path), os.fstat(self._fd)
        except OSError:
            return False  # it is being replaced: the next look will tell
        if not stat.S_ISREG(now.st_mode):
            return False
        return (now.st_dev, now.st_ino) != (ours.st_dev, ours.st_ino) or now.st_size < self._position

    def _start_anew(self) -> None:
        try:
            fresh = _open(str(self._path))
        except ConfigError:
            return  # gone once more: the next look will tell
        os.close(self._fd)
        self._fd, self._position, self._waits = fresh, 0, False


def _open(path: str) -> int:
    if path == "-":
        return sys.stdin.fileno()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError("metrics", expected="a readable file", found=f"{path} ({why})") from None
    kind = os.fstat(fd).st_mode
    if stat.S_ISDIR(kind) or stat.S_ISBLK(kind):
        os.close(fd)
        raise ConfigError("metrics", expected="a file of JSON lines", found=f"{path}, a directory or disk")
    return fd
