"""The two conditions of a figure: nothing else to do, or one Python thread of this process that never rests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


@contextmanager
def one_busy_thread() -> Iterator[None]:
    """A thread that holds the GIL as much as it is let."""
    stop = threading.Event()
    thread = threading.Thread(target=_spin, args=(stop,), name="busy", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _spin(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(100))


CONDITIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {"idle": nullcontext, "busy": one_busy_thread}
"""By the name that a record's ``conditions.python_thread`` has."""
