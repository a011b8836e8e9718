"""Balloon: a running VM's memory given back and taken again, as ``vm.balloon`` whatever machine is underneath.

    reached = await vm.balloon.set(100)
    stats = await vm.balloon.stats()

A machine offers a BalloonBackend; the waiting, the checks and the polling are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import anyio

from asyncvmm.devices.virtio.balloon.stats import PAGES_PER_MIB, BalloonStats
from asyncvmm.errors import ConfigError, GuestError, StateError
from asyncvmm.waiters import Waiters

if TYPE_CHECKING:
    from asyncvmm.devices.virtio.balloon.device import VirtioBalloon

STALL_S = 3.0
"""Seconds without a page moving after which ``set`` takes what there is. Linux pauses 0.2 s when it is out of pages."""

ANSWER_S = 10.0
"""Seconds that a guest has to answer a question."""

_LOOK_S = 0.02
"""Between two looks at a balloon on its way."""


class BalloonBackend(Protocol):
    """One machine's balloon device. Pages are of 4 KiB.

    Every call raises StateError if the guest has no driver for it (yet), or does not run any more.
    """

    async def set_target_pages(self, pages: int) -> None:
        """Ask the guest for a balloon of that size; does not wait for it. ``pages`` fits into 32 bits."""

    async def actual_pages(self) -> int:
        """The size that the guest says the balloon has now. Cheap: it is asked many times a second meanwhile."""

    async def stats(self) -> BalloonStats:
        """Fresh statistics. Raises GuestError (reason ``timeout``) from a guest that does not answer."""

    async def hint_free_pages(self) -> int:
        """Have the guest name its free pages, and give those to the host; returns how many bytes they were.

        Raises StateError also where that was not asked for, or the machine has no such thing, GuestError as above.
        """


class Balloon:
    """The balloon of one VM. ``latest`` is the newest BalloonStats seen by ``stats`` or ``poll``, None before."""

    def __init__(self, find: Callable[[], BalloonBackend | None], memory_mib: int) -> None:
        """``find`` gives the machine's balloon; None where there is none, or no machine. ``memory_mib`` is all RAM."""
        self.latest: BalloonStats | None = None
        self._find = find
        self._memory_mib = memory_mib
        self._asked = 0

    async def set(self, mib: int, *, stall_s: float = STALL_S) -> int:
        """Have the guest give ``mib`` MiB to the host, or take back what is above; returns the MiB reached.

        That is ``mib``, or less (or more) if for ``stall_s`` seconds no page moved, or if another ``set`` has come
        meanwhile. The guest goes on trying: the target stays, also when this is cancelled.

        Raises ConfigError for more than the guest's memory, StateError without balloon, driver or running guest.
        """
        if isinstance(mib, bool) or not isinstance(mib, int) or not 0 <= mib <= self._memory_mib:
            raise ConfigError("balloon", expected=f"0 to {self._memory_mib} MiB", found=repr(mib))
        self._asked += 1
        asked, backend, pages = self._asked, self._backend(), mib * PAGES_PER_MIB
        await backend.set_target_pages(pages)
        seen, deadline = -1, 0.0
        while (actual := await backend.actual_pages()) != pages and asked == self._asked:
            if actual != seen:
                seen, deadline = actual, anyio.current_time() + stall_s
            elif anyio.current_time() >= deadline:
                break
            await anyio.sleep(_LOOK_S)
        return actual // PAGES_PER_MIB

    async def stats(self) -> BalloonStats:
        """The guest's memory statistics as they are now.

        Raises StateError without balloon, driver or running guest, GuestError from a guest that does not answer.
        """
        self.latest = await self._backend().stats()
        return self.latest

    async def hint_free_pages(self) -> int:
        """Take the pages that are free in the guest just now; it gets them back by using them. Returns their bytes.

        Raises StateError without balloon, driver, running guest or ``free_page_hinting``, GuestError from a guest that
        does not answer.
        """
        return await self._backend().hint_free_pages()

    async def poll(self, interval_s: float) -> None:
        """Keep ``latest`` new, every ``interval_s`` seconds until cancelled; a guest that cannot answer is let be."""
        while True:
            with suppress(StateError, GuestError):
                await self.stats()
            await anyio.sleep(interval_s)

    def _backend(self) -> BalloonBackend:
        backend = self._find()
        if backend is None:
            raise StateError("balloon", expected="a booted VM with VMConfig(balloon=...)", found="no balloon")
        return backend


class DeviceBalloon:
    """The BalloonBackend over a balloon device of ours, on the event loop that its queues belong to."""

    def __init__(self, device: VirtioBalloon, *, answer_s: float = ANSWER_S) -> None:
        """``answer_s``: seconds that the guest has to answer a question."""
        self._device = device
        self._answer_s = answer_s
        self._stats = Waiters()
        self._hinted = Waiters()
        device.on_stats = self._stats.wake
        device.on_hinted = self._hinted.wake

    async def set_target_pages(self, pages: int) -> None:
        """See BalloonBackend."""
        with self._session():
            self._device.set_target_pages(pages)

    async def actual_pages(self) -> int:
        """See BalloonBackend."""
        with self._session():
            return self._device.actual_pages

    async def stats(self) -> BalloonStats:
        """See BalloonBackend. A driver without a statistics queue leaves all but the balloon's size unsaid."""
        with self._session():
            if not self._device.has_stats:
                return self._device.stats()
            self._device.request_stats()
            answered = self._stats.join()
        await self._answer("statistics", answered)
        return self._device.stats()

    async def hint_free_pages(self) -> int:
        """See BalloonBackend."""
        with self._session():
            if not self._device.has_hinting:
                raise StateError("balloon", expected="free page hinting", found="not negotiated")
            self._device.start_hinting()
            answered = self._hinted.join()
        await self._answer("free pages", answered)
        return self._device.hinted_bytes

    async def _answer(self, what: str, answered: anyio.Event) -> None:
        with anyio.move_on_after(self._answer_s):
            await answered.wait()
            return
        raise GuestError(what, reason="timeout", expected=f"an answer within {self._answer_s:g} s", found="none")

    @contextmanager
    def _session(self) -> Iterator[None]:
        with self._device.session() as running:
            if not running:
                raise StateError("balloon", expected="a guest with a driver for it", found="no driver")
            yield
