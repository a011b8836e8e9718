"""Notices an event loop that stands still, and tells the loop's own doing from a machine that is busy elsewhere.

A heartbeat on the loop falls due every few milliseconds. While it is late, a bystander thread looks at what the loop's
thread does. A stall is time during which it was seen in the package's code or in what that code called, less the time
for which the kernel kept it waiting for a processor (/proc/.../schedstat), another machine had ours (steal, proc(5)),
garbage was collected, or the bystander itself came late: then others had the interpreter or the processors. Waiting for
a new thread to come to life is not blamed, nor is what a test does on the loop by itself: reading its own files, or
walking the heap of a long session.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import CodeType, FrameType

import attrs

LONGEST_STALL_S = 2.0 if os.environ.get("ASYNCVMM_LAB") == "1" else 0.05
"""In the lab, whose processor is emulated, what the host takes for itself looks like the loop's own doing."""
PERIOD_S = 0.005
BEATS_PER_SAMPLE = 20
"""To ask what was stolen takes a tenth of a millisecond."""

PACKAGE = Path(__file__).parents[2] / "asyncvmm"

_LOOPS = ("_run_once", "run_forever", "run_until_complete", "run_test", "run_asyncgen_fixture", "run_fixture")
"""Functions of asyncio and anyio that run the loop: what called them is not on it."""

_STEAL = 8
"""Its place in the line "cpu" of proc(5)."""

_COLLECTING = {"since": 0.0, "total": 0.0}


@attrs.frozen
class Stall:
    """The loop stood still for ``seconds``, ``stack`` being what its thread did in the midst of it."""

    seconds: float
    stack: str


class Bystander:
    """A thread that only sleeps, and keeps when it came late; it also looks at what a late loop is doing."""

    def __init__(self) -> None:
        self.late: deque[tuple[float, float]] = deque(maxlen=1000)
        self.watched: StallWatch | None = None
        self._thread = threading.Thread(target=self._run, name="bystander", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            due = time.monotonic() + PERIOD_S
            time.sleep(PERIOD_S)
            now = time.monotonic()
            if now - due > PERIOD_S:
                self.late.append((due, now))
            if self.watched is not None:
                self.watched.look(now)

    def lateness_between(self, start: float, end: float) -> float:
        """Seconds of that span in which this thread, too, should have run and did not."""
        return sum(max(0.0, min(end, now) - max(start, due)) for due, now in list(self.late))


class StallWatch:
    """Watches the running loop for the time of a block: ``async with StallWatch(bystander) as watch``.

    ``blamed`` is the directory whose code is.
    """

    def __init__(self, bystander: Bystander, blamed: Path = PACKAGE) -> None:
        self._blamed = str(blamed)
        self.worst: Stall | None = None
        self._bystander = bystander
        self._due = float("inf")
        self._stolen = 0.0
        self._seen: list[float] = []
        self._stack: traceback.StackSummary | None = None

    async def __aenter__(self) -> StallWatch:
        self._thread = threading.get_ident()
        self._schedstat = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        self._bystander.watched = self
        return self

    async def __aexit__(self, *_: object) -> None:
        self._bystander.watched = None
        self._task.cancel()
        await asyncio.wait([self._task])

    def look(self, now: float) -> None:
        """From the bystander: what does the loop's thread do, if it is late?"""
        if now - self._due <= PERIOD_S:
            return
        with _nothing_collected():
            frame = sys._current_frames().get(self._thread)
            if frame is not None and _is_of(frame, self._blamed):
                self._seen.append(now)
                if now - self._due > LONGEST_STALL_S / 2 and self._stack is None:
                    self._stack = _stack_of(frame)

    async def _beat(self) -> None:
        for number in count():
            if number % BEATS_PER_SAMPLE == 0:
                self._stolen = stolen_s()
            waited, ran = self._waited(), time.thread_time()
            self._seen, self._stack, self._due = [], None, time.monotonic() + PERIOD_S
            await asyncio.sleep(PERIOD_S)
            self._judge(self._due, self._waited() - waited, time.thread_time() - ran)

    def _waited(self) -> float:
        return int(self._schedstat.read_text().split()[1]) / 1e9 + _COLLECTING["total"]

    def _judge(self, due: float, waited: float, ran: float) -> None:
        if not self._seen:
            return
        last = self._seen[-1]
        # The bystander may be late because the loop's thread keeps the interpreter: no excuse for it.
        late_too = max(0.0, self._bystander.lateness_between(due, last) - ran)
        seconds = last - due - waited - late_too
        if seconds > PERIOD_S:
            seconds -= stolen_s() - self._stolen
        if seconds > (self.worst.seconds if self.worst else 0.0):
            self.worst = Stall(seconds, "".join(self._stack.format()) if self._stack is not None else "")


def stolen_s(stat: str | None = None) -> float:
    """Seconds for which a hypervisor gave our processors to others, on all of them; ``stat`` as /proc/stat."""
    fields = (Path("/proc/stat").read_text() if stat is None else stat).split("\n", 1)[0].split()
    return int(fields[_STEAL]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage collected amid ``sys._current_frames`` may let go of the interpreter while its list of threads is locked;
    a thread that ends then waits for that list with the interpreter in its hands, and nothing goes on ever again.
    Collected amid ``f_back``, it lets the frame that is being made into an object end before that is done. (CPython
    3.11.)"""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _stack_of(frame: FrameType) -> traceback.StackSummary:
    """Its lines are read when it is formatted: a file that is open for a moment, on another thread than the test's,
    would be counted among what the test holds."""
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=8, lookup_lines=False)
    stack.reverse()
    return stack


def _is_of(frame: FrameType, directory: str) -> bool:
    """Whether the frame or one that called it, up to the event loop, is in a file of that directory."""
    if frame.f_code.co_name == "wait" and _called_by(frame, threading.Thread.start.__code__):
        return False
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_name not in _LOOPS:
        if inner.f_code.co_filename.startswith(directory) and inner.f_code.co_filename != __file__:
            return True
        inner = inner.f_back
    return False


def _called_by(frame: FrameType, code: CodeType) -> bool:
    callers = [caller for caller in (frame.f_back, frame.f_back and frame.f_back.f_back) if caller]
    return any(caller.f_code is code for caller in callers)


def count_garbage_collection(phase: str, _: Mapping[str, int]) -> None:
    """For gc.callbacks: a test session's heap is large, and what it costs to walk it is not the loop's fault."""
    if phase == "start":
        _COLLECTING["since"] = time.thread_time()
    else:
        _COLLECTING["total"] += time.thread_time() - _COLLECTING["since"]


def install() -> Bystander:
    """Once a session."""
    gc.callbacks.append(count_garbage_collection)
    return Bystander()
