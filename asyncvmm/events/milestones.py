"""Milestone: something that happens at most once to a VM, awaitable as often as one likes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

import anyio

from asyncvmm.errors import AsyncVMMError

T = TypeVar("T")


class Milestone(Generic[T]):
    """``await milestone`` gives the value once it is set, or raises the error it failed with.

    Any number of tasks may await it, before or after; cancelling one does not touch the others. Nothing complains if
    nobody awaits a failed one. It may be made without a running loop; set() and fail() are for the loop's thread.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: AsyncVMMError | None = None
        self._values: list[T] = []
        self._event: anyio.Event | None = None

    def __repr__(self) -> str:
        outcome = f"failed: {self.error}" if self.error else f"reached: {self._values[0]!r}" if self.done else "pending"
        return f"<Milestone {self.name} {outcome}>"

    @property
    def done(self) -> bool:
        """Whether it was reached or failed."""
        return bool(self._values) or self.error is not None

    @property
    def value(self) -> T | None:
        """The value, None if there is none."""
        return self._values[0] if self._values else None

    def set(self, value: T) -> bool:
        """It is reached. The first outcome counts; returns whether this was it."""
        if self.done:
            return False
        self._values.append(value)
        self._wake()
        return True

    def fail(self, error: AsyncVMMError) -> bool:
        """It can not be reached any more. The first outcome counts; returns whether this was it."""
        if self.done:
            return False
        self.error = error
        self._wake()
        return True

    async def wait(self) -> T:
        """The value, once there is one. Raises the error it failed with, a new copy for each caller."""
        if not self.done:
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()
        if self.error is not None:
            raise fresh(self.error)
        return self._values[0]

    def __await__(self) -> Generator[Any, Any, T]:
        return self.wait().__await__()

    def _wake(self) -> None:
        if self._event is not None:
            self._event.set()


def fresh(error: AsyncVMMError) -> AsyncVMMError:
    """A copy of ``error`` with the same facts and cause, and no traceback yet.

    One exception object raised in several tasks would collect the traceback of each.
    """
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
