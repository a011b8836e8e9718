"""Where bytes can go without ever blocking the loop: files, pipes, terminals, unix sockets, callbacks.

A descriptor that is lent to us shares its open file description with others (a shell's terminal, a parent's pipe), so
O_NONBLOCK is never set on it: Linux sets it for every holder. Where possible the file behind it is opened anew through
/proc/self/fd, non-blocking for us alone; else it is polled, and given at most PIPE_BUF bytes, which a pipe that polls
writable takes without blocking (pipe(7)).
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import attrs

from asyncvmm.errors import ConfigError


@attrs.define(eq=False)
class SharedFile:
    """One open file for the events of several VMs: its descriptor, and its name as it was asked for. ``is_gone``:
    somebody has said so."""

    fd: int
    name: str
    is_gone: bool = False


Target = str | Path | int | Callable[[bytes], None] | SharedFile
"""A path (made, or emptied), ``-`` for stdout, ``unix:PATH`` to connect to, an open descriptor, a callback, or what
``shared_file`` gives."""

_STANDARD: Final[Mapping[Target, str]] = {"-": "stdout", 1: "stdout", 2: "stderr"}
_OTHERS = (str, os.PathLike, int, SharedFile)
_OWN_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Output(Protocol):
    """Takes bytes. ``fd`` is what to wait on when it takes none."""

    @property
    def fd(self) -> int:
        """A descriptor, or -1."""

    def write(self, data: bytearray) -> int:
        """Take a first part of ``data``; returns its length, 0 if it takes none now. Raises OSError if it is dead."""

    def close(self) -> None:
        """Give up what is held. May be called again."""


def open_output(target: Target) -> Output:
    """Open ``target`` for writing, without waiting for anybody. Raises ConfigError if that cannot be."""
    _check(target)
    try:
        if callable(target):
            return CallbackOutput(target)
        if isinstance(target, int):
            return _of_descriptor(target)
        if isinstance(target, SharedFile):
            return _of_descriptor(target.fd)
        name = os.fsdecode(target)
        if name == "-":
            return _of_descriptor(1)
        return _connect(name[5:]) if name.startswith("unix:") else _of_path(name)
    except (OSError, ValueError) as error:
        raise ConfigError(name_of(target), expected=_expected(error), found=reason_of(error)) from error


@contextmanager
def shared_file(name: str) -> Iterator[SharedFile]:
    """Make, or empty, the file of that name: several write to it, each behind the others. Raises ConfigError."""
    try:
        fd = os.open(name, _OWN_FLAGS | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    except (OSError, ValueError) as error:
        raise ConfigError(name_of(name), expected=_expected(error), found=reason_of(error)) from None
    try:
        yield SharedFile(fd, name)
    finally:
        os.close(fd)


def name_of(target: Target) -> str:
    """What a person calls it."""
    if isinstance(target, int) or target == "-":
        return _STANDARD.get(target, f"descriptor {target}")
    return name_of(target.name) if isinstance(target, SharedFile) else f"event output {target}"


def reason_of(error: OSError | ValueError) -> str:
    """Why it cannot be written to, in words."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _check(target: object) -> None:
    if callable(target):
        call = getattr(target, "__call__", None)  # noqa: B004 -- an object may have an async one
        if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(call):
            raise ConfigError("event output", expected="a callback that is no coroutine function", found=repr(target))
    elif isinstance(target, bool) or target == "" or not isinstance(target, _OTHERS):
        expected = "a path, -, unix:PATH, a descriptor or a callback"
        raise ConfigError("event output", expected=expected, found=repr(target))


class CallbackOutput:
    """Hands each batch to a function. Whatever it raises counts as its death."""

    fd = -1

    def __init__(self, callback: Callable[[bytes], None]) -> None:
        self._callback = callback

    def write(self, data: bytearray) -> int:
        """Call the function with all of ``data``."""
        try:
            self._callback(bytes(data))
        except Exception as error:
            raise OSError(errno.EPIPE, f"the callback raised {error!r}") from error
        return len(data)

    def close(self) -> None:
        """Nothing to give up."""


class FileOutput:
    """A descriptor of our own that does not block: a regular file, or anything opened with O_NONBLOCK."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._whole = stat.S_ISREG(os.fstat(fd).st_mode)
        self._torn = 0

    @property
    def fd(self) -> int:
        """The descriptor, -1 once closed."""
        return self._fd

    def write(self, data: bytearray) -> int:
        """Write what fits; to a pipe, at most PIPE_BUF bytes that end with a line, which no other writer can tear."""
        end = len(data)
        if end > select.PIPE_BUF and not self._whole:
            end = data.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
        try:
            count = os.write(self._fd, data[:end])
        except BlockingIOError:
            return 0
        except OSError:
            self._mend()
            raise
        whole = data.rfind(b"\n", 0, count) + 1
        self._torn = count - whole if whole else self._torn + count
        return count

    def _mend(self) -> None:
        """Take back the part of a line for whose rest there is no room, unless somebody wrote behind it."""
        if self._whole and self._torn:
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if end == os.fstat(self._fd).st_size:
                os.ftruncate(self._fd, end - self._torn)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class PolledOutput(FileOutput):
    """A shared descriptor that may block: poll(2) is asked before each write."""

    def write(self, data: bytearray) -> int:
        """Write some, if that would not block."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return super().write(data) if poller.poll(0) else 0


class SocketOutput:
    """A socket, ours or shared: MSG_DONTWAIT makes each call non-blocking, whatever its flags."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @property
    def fd(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._socket.fileno()

    def write(self, data: bytearray) -> int:
        """Send what fits."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close our descriptor of it."""
        self._socket.close()


class WriteWatch:
    """Waits for room in ``watched`` by way of an epoll instance, whose ``fd`` turns readable then.

    The loop is given this descriptor and not the watched one, since uvloop sets O_NONBLOCK on what it is given.
    Raises OSError for what epoll does not take, as regular files.
    """

    def __init__(self, watched: int) -> None:
        self._epoll = select.epoll()
        try:
            self._epoll.register(watched, select.EPOLLOUT)
        except BaseException:
            self._epoll.close()
            raise
        self.fd = self._epoll.fileno()

    def close(self) -> None:
        """Stop watching; take ``fd`` from the loop before."""
        self._epoll.close()


def _of_path(name: str) -> Output:
    # O_NONBLOCK: a FIFO that nobody reads is refused (ENXIO) instead of waited for. A regular file does not care.
    return FileOutput(os.open(name, _OWN_FLAGS | os.O_CREAT | os.O_TRUNC, 0o666))


def _of_descriptor(fd: int) -> Output:
    mode = os.fstat(fd).st_mode
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "one that is closed, or open for reading")
    if stat.S_ISSOCK(mode):
        return SocketOutput(socket.socket(fileno=os.dup(fd)))
    if stat.S_ISREG(mode):
        return FileOutput(os.dup(fd))  # opened anew, it would have an offset of its own
    try:
        return FileOutput(os.open(f"/proc/self/fd/{fd}", _OWN_FLAGS))
    except OSError:
        return PolledOutput(os.dup(fd))


def _connect(path: str) -> Output:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return SocketOutput(sock)


def _expected(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENXIO:
        return "a FIFO with a reader, or a file (for a socket, unix:PATH)"
    return "something to write to"
