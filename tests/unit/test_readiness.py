"""How a guest's end is put into words."""

from __future__ import annotations

import pytest

from asyncvmm.effects import Stopped
from asyncvmm.readiness import describe_end


@pytest.mark.parametrize(
    ("stopped", "words"),
    [
        (Stopped("shutdown"), "shutdown"),
        (Stopped("panic", detail="no init found"), "panic (no init found)"),
        (Stopped("debug-exit", code=3), "debug exit with 3"),
        (Stopped("init-error", detail="root=22"), "init-error (the root file system: Invalid argument)"),
        (Stopped("init-error", detail="root=99999"), "init-error (the root file system: 99999)"),
        (Stopped("init-error", detail="other=x"), "init-error (other: x)"),
    ],
)
def test_an_end_is_told_in_one_line(stopped: Stopped, words: str) -> None:
    assert describe_end(stopped) == words
