"""The one door from vCPU threads to the loop: items in from any thread, batches out on the loop.

The habit is that of trio's entry queue: an item is stored first, then the loop is woken, and only by the post that
found nobody woken yet. A drain takes the mark away together with the items, so that an item is either in this batch or
wakes the loop again; no wake-up is lost, and at most one is under way.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

CAPACITY: Final = 65536


class Mailbox(Generic[T]):
    """Items on their way to the loop, in the order in which they were posted.

    wake: makes the loop call ``drain`` soon, from any thread; ``loop.call_soon_threadsafe`` with a callback. If it
    raises RuntimeError, as it does on a loop that has closed, the mailbox closes. It is called without the mailbox's
    lock.

    capacity: items that may wait before droppable ones are dropped; the others are at twice that.
    """

    def __init__(self, wake: Callable[[], object], capacity: int = CAPACITY) -> None:
        self._wake = wake
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._dropped = 0
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def dropped(self) -> int:
        """Items dropped because the mailbox was full or closed."""
        return self._dropped

    @property
    def closed(self) -> bool:
        """Whether every further post is dropped."""
        return self._closed

    def post(self, item: T, *, droppable: bool = False) -> bool:
        """Leave ``item`` for the loop; from any thread, never waiting for the loop.

        Returns False if it was dropped, and counted: the mailbox is full or closed. ``droppable`` items (traces) find
        it full first, so that they cannot crowd out one that nobody would repeat.
        """
        with self._lock:
            if self._closed or len(self._items) >= self._capacity * (1 if droppable else 2):
                self._dropped += 1
                return False
            self._items.append(item)
            wake = not self._woken
            self._woken = True
        if wake:
            self._wake_up()
        return not self._closed

    def drain(self, batch: int | None = None) -> list[T]:
        """Take all items, or the first ``batch`` of them; what is left wakes the loop again. On the loop."""
        with self._lock:
            count = len(self._items) if batch is None else min(batch, len(self._items))
            items = [self._items.popleft() for _ in range(count)]
            self._woken = bool(self._items)
            wake = self._woken
        if wake:
            self._wake_up()
        return items

    def close(self) -> None:
        """Drop and count what is waiting and every later post. May be called again."""
        with self._lock:
            self._closed = True
            self._dropped += len(self._items)
            self._items.clear()

    def _wake_up(self) -> None:
        try:
            self._wake()
        except RuntimeError:
            self.close()
