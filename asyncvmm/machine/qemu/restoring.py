"""What a QEMU is told that is to go on from a saved state: ``-incoming defer``, and the rest by QMP.

Facts: docs/devel/migration.rst, migration/fd.c and migration/savevm.c of QEMU 7.2. ``fd:`` takes the number of an
inherited descriptor here. A state that QEMU cannot read ends it, with words on its standard error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

from asyncvmm.errors import MachineError

_CAPABILITIES: Final = ("x-ignore-shared", "events")


def incoming(descriptor: int) -> list[tuple[str, Mapping[str, Any]]]:
    """The QMP commands that have the state read from there; the event MIGRATION says when that is done."""
    capabilities = [{"capability": name, "state": True} for name in _CAPABILITIES]
    return [
        ("migrate-set-capabilities", {"capabilities": capabilities}),
        ("migrate-incoming", {"uri": f"fd:{descriptor}"}),
    ]


class StateFile:
    """A state as a file for one QEMU: each reads it from its own place on. Raises MachineError for want of memory."""

    def __init__(self, state: bytes) -> None:
        self._state = state
        self.fd = -1

    def __enter__(self) -> StateFile:
        try:
            self.fd = os.memfd_create("state")
            rest = memoryview(self._state)
            while rest:
                rest = rest[os.write(self.fd, rest) :]
            os.lseek(self.fd, 0, os.SEEK_SET)
        except OSError as error:
            self._close()
            raise MachineError("QEMU's state", expected="memory for it", found=error.strerror) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
