"""The command line's stdin, stdout and stderr, which whoever starts us may have closed, or pointed at what is full.

A closed one is opened so that its use fails (as gnulib's stdopen does; complaints go nowhere): else the next file
opened would take its number, and what is printed would go there. uvloop does not even start with such a number.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

EXIT_READER_GONE: Final = 128 + signal.SIGPIPE
"""What a shell gives for a command that wrote to a pipe which nobody reads: it did not fail, as ``| head`` shows."""

_STREAMS = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
_NO_ROOM = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def hold_standard_streams() -> None:
    """Open those that are closed; reading stdin and writing stdout then raises OSError."""
    for number, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 -- for good


@contextmanager
def stdout_lost(exit_code: int) -> Iterator[None]:
    """End with one line on stderr and ``exit_code`` if by the end of the block stdout did not take what it was given.

    A reader that is gone needs no line, and gives EXIT_READER_GONE. Other errors pass.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not _of_stdout(error):
            raise
        _forget_stdout()
        if error.errno == errno.EPIPE:
            sys.exit(EXIT_READER_GONE)
        print(f"asyncvmm: stdout: expected something to write to, found {error.strerror}", file=sys.stderr)
        sys.exit(exit_code)


def _of_stdout(error: OSError) -> bool:
    """Whether stdout is to blame: errors of files are told as errors of ours long before."""
    if error.errno != errno.EBADF:
        return error.filename is None and error.errno in _NO_ROOM
    try:
        os.write(sys.stdout.fileno(), b"")
    except OSError:
        return True
    return False


def _forget_stdout() -> None:
    """Python flushes it once more at the end."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
