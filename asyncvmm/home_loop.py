"""HomeLoop: the event loop that a VM belongs to. Its descriptors are in that loop's selector, its tasks run there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncvmm.errors import StateError


class HomeLoop:
    """Of one VM, whose state ``state`` gives. It belongs to the loop on which it is first claimed."""

    def __init__(self, state: Callable[[], str]) -> None:
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None

    def claim(self, what: str) -> None:
        """``what`` binds the VM to the loop that runs here. Raises StateError if it belongs to another one."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        else:
            self.check(what)

    def check(self, what: str) -> None:
        """Raises StateError if ``what`` is called on another loop than the VM's; before it has one, any will do."""
        if self._loop is not None and running_loop() not in (None, self._loop):
            found = "another one (the VM's is closed)" if self._loop.is_closed() else "another one"
            expected = "the event loop that the VM was started on"
            raise StateError(what, expected=expected, found=found, state=self._state())


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The one that runs on this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
