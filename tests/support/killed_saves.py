"""Saves that are killed at their n-th line: run as a program of one thread, which forks for each n.

    python -m tests.support.killed_saves SCENARIO DIRECTORY [STRIDE]

After each kill, what is at the snapshot's place must be what was there before, or what was to come, whole. Then the
next save must succeed and leave nothing else behind. Prints how many lines a save has. A STRIDE tries fewer of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from asyncvmm.errors import SnapshotDamaged
from asyncvmm.snapshot.flatten import flatten
from asyncvmm.snapshot.loading import load
from asyncvmm.snapshot.verify import verify
from tests.support.snapshots import SIZE, memory_of, page, save

WRITING = tuple(f"asyncvmm/snapshot/{name}.py" for name in ("directory", "flatten", "memory_writer", "renaming"))
"""The modules that change anything."""

OLD, NEW = {1: page("old")}, {1: page("new"), 7: page(7)}


def at_line(number: int) -> Any:
    """A trace function that kills this process at the n-th line of asyncvmm's own that is run from now on."""
    left, lock = number, threading.Lock()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith(WRITING):
            return None
        if event == "line":
            with lock:
                left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def killed(number: int, work: Callable[[], object]) -> bool:
    """Whether ``work`` was killed at its n-th line; it had fewer if not."""
    child = os.fork()
    if not child:
        code = 1
        try:
            trace = at_line(number)
            threading.settrace(trace)
            sys.settrace(trace)
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def content(path: Path) -> bytes | None:
    """The memory of the snapshot there, which must be whole; None if there is nothing."""
    if not path.exists():
        return None
    verify(path).raise_for_problems()
    with load(path) as loaded:
        return memory_of(loaded)


def expect(path: Path, *allowed: bytes | None) -> None:
    """That the snapshot there is one of these."""
    try:
        found = content(path)
    except SnapshotDamaged as error:
        raise AssertionError(f"something half-made was found: {error}") from error
    assert found in allowed, "another snapshot was found"


def memory(*layers: dict[int, bytes]) -> bytes:
    """Memory in which there are those pages."""
    made = bytearray(SIZE)
    for pages in layers:
        for number, data in pages.items():
            made[number * 4096 : (number + 1) * 4096] = data
    return bytes(made)


def first_save(place: Path, number: int) -> bool:
    """Where nothing was."""
    out = place / "s"
    again = killed(number, lambda: save(out, NEW, disk=True))
    expect(out, None, memory(NEW)) if again else expect(out, memory(NEW))
    if not out.exists():
        save(out, NEW, disk=True)
    assert sorted(os.listdir(place)) == ["s"], os.listdir(place)
    shutil.rmtree(out)
    return again


def replacing_save(place: Path, number: int) -> bool:
    """In the place of another."""
    out = place / "s"
    save(out, OLD)
    again = killed(number, lambda: save(out, NEW, replace=True))
    expect(out, memory(OLD), memory(NEW)) if again else expect(out, memory(NEW))
    save(out, NEW, replace=True)
    expect(out, memory(NEW))
    assert sorted(os.listdir(place)) == ["s"], os.listdir(place)
    shutil.rmtree(out)
    return again


def flattening(place: Path, number: int) -> bool:
    """A chain of two, in its place."""
    base, out = place / "base", place / "s"
    save(base, OLD | {3: page(3)})
    save(out, NEW | {3: bytes(4096)}, base=base)
    again = killed(number, lambda: flatten(out))
    whole = memory(OLD, {3: page(3)}, NEW, {3: bytes(4096)})
    expect(out, whole)
    flatten(out)
    shutil.rmtree(base)
    expect(out, whole)
    save(out, NEW, replace=True)
    assert sorted(os.listdir(place)) == ["s"], os.listdir(place)
    shutil.rmtree(out)
    return again


SCENARIOS = {"first": first_save, "replacing": replacing_save, "flattening": flattening}


def main(scenario: str, place: str, stride: str = "1") -> None:
    """Until a save is over before it is killed."""
    number = 0
    while SCENARIOS[scenario](Path(place), number):
        number += int(stride)
    print(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
