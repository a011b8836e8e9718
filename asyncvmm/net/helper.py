"""A network helper as a child process: started, watched, stopped, and its last words kept for an error.

It dies with us. The kernel forgets the parent-death signal of a child that changes its user, as passt does; but both
helpers end by themselves when the other end of their wire is closed, which is all that our death takes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from asyncvmm.errors import HostError, MachineError
from asyncvmm.machine.qemu.child import Child
from asyncvmm.machine.waiting import wait_out

_NOISE: Final = re.compile(r"Failed to send \d+ bytes to syslog")
_LINES: Final = 3


class Helper(Child):
    """A running helper, made by ``begin``, ``name`` in errors; ``ended`` is set once it has ended and been reaped."""

    name: str
    ended: asyncio.Event

    @classmethod
    async def begin(cls, name: str, command: Sequence[str], descriptors: Sequence[int]) -> Helper:
        """Start it, as ``Child.start`` does. Raises HostError."""
        try:
            helper = await cls.start(command, descriptors)
        except MachineError as error:
            raise HostError(f"{name} could not be started", found=error.found) from error
        helper.name = name
        helper.ended = asyncio.Event()
        helper.watch(helper.ended.set)
        return helper

    def last_words(self) -> str:
        """The last lines of its error output, less what is of no help."""
        lines = (line.strip() for line in self._tail.decode(errors="replace").split("\n"))
        return "; ".join([line for line in lines if line and not _NOISE.fullmatch(line)][-_LINES:])

    def failure(self) -> HostError:
        """That it ended, and how."""
        status = self.status or 0
        how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        words = self.last_words()
        return HostError(self.name, expected="a running network helper", found=f"{how}: {words}" if words else how)

    async def stop(self) -> None:
        """Kill it, unless it has ended, and wait until it is reaped. May be called again."""
        self.kill()
        await wait_out(asyncio.ensure_future(self.ended.wait()))
