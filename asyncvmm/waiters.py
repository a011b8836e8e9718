"""Waiters: tasks that wait for the next of something."""

from __future__ import annotations

import anyio


class Waiters:
    """``await waiters.join().wait()`` returns at the next ``wake``. Both belong to one event loop."""

    def __init__(self) -> None:
        self._events: list[anyio.Event] = []

    def join(self) -> anyio.Event:
        """An event that is set the next time."""
        event = anyio.Event()
        self._events.append(event)
        return event

    def wake(self) -> None:
        """This is it."""
        events, self._events = self._events, []
        for event in events:
            event.set()
