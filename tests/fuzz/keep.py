"""A small set of scripts that leads wherever a whole corpus does: what ordinary tests play again."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from tests.fuzz.inputs import Run

_WATCHED = "/asyncvmm/"

Step = tuple[str, int, int]
"""A file, and two lines of it of which one was run after the other."""


def steps(run: Run, script: bytes) -> set[Step]:
    """Where a script leads."""
    found: set[Step] = set()

    def enter(frame: FrameType, event: str, _: object) -> Any:
        name = frame.f_code.co_filename
        if _WATCHED not in name:
            return None
        before = 0

        def inside(frame: FrameType, event: str, _: object) -> Any:
            nonlocal before
            if event == "line":
                found.add((name, before, frame.f_lineno))
                before = frame.f_lineno
            return inside

        return inside

    sys.settrace(enter)
    try:
        run(script)
    finally:
        sys.settrace(None)
    return found


def fewest(run: Run, scripts: Iterable[bytes]) -> list[bytes]:
    """Of these scripts, short ones first, those that lead somewhere new."""
    kept: list[bytes] = []
    seen: set[Step] = set()
    for script in sorted(set(scripts), key=lambda script: (len(script), script)):
        if new := steps(run, script) - seen:
            seen |= new
            kept.append(script)
    return _without_needless(run, kept)


def _without_needless(run: Run, scripts: list[bytes]) -> list[bytes]:
    """Long ones often lead wherever short ones do."""
    kept: list[bytes] = []
    seen: set[Step] = set()
    for script in reversed(scripts):
        if new := steps(run, script) - seen:
            seen |= new
            kept.append(script)
    return kept[::-1]
