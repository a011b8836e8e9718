"""What a snapshot is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.snapshot.order import SnapshotOrder
from asyncvmm.snapshot.predicate import Predicate
from asyncvmm.snapshot.predicates import after, idle, listener, pre_exec
from asyncvmm.snapshot.resources import SnapshotResources


@pytest.mark.parametrize(
    "when",
    [SnapshotResources(on_pre_exec=True), pre_exec(), pre_exec() | after(60_000), after(5) | pre_exec() & idle(1)],
    ids=str,
)
def test_who_waits_for_the_pre_exec_has_the_workload_held(when: SnapshotResources | Predicate) -> None:
    assert SnapshotOrder(when=when).wants_pre_exec


@pytest.mark.parametrize("when", [None, SnapshotResources(on_listener=True), after(5) | listener()], ids=str)
def test_nobody_else_has(when: SnapshotResources | Predicate | None) -> None:
    assert not SnapshotOrder(when=when).wants_pre_exec
    assert not SnapshotOrder(when=when).needs_pre_exec


def test_once_the_workload_was_let_run_something_else_may_come() -> None:
    for when in (SnapshotResources(on_pre_exec=True), pre_exec(), pre_exec() & after(5), pre_exec() | pre_exec()):
        assert SnapshotOrder(when=when).needs_pre_exec
    for when in (pre_exec() | after(5), (pre_exec() & idle(1)) | listener()):
        assert not SnapshotOrder(when=when).needs_pre_exec


@pytest.mark.parametrize("out", ["", "a\0b", "\udfff", 5], ids=ascii)
def test_a_path_that_no_directory_can_have_is_refused(out: Any) -> None:
    with pytest.raises(ConfigError, match="a path that a directory can have"):
        SnapshotOrder(out=out)


def test_its_own_path_goes_before_that_of_what_it_waits_for() -> None:
    when = SnapshotResources(after_ms=0, out_path="one")
    assert SnapshotOrder(when=when).directory == Path("one")
    assert SnapshotOrder(when=when, out=Path("two")).directory == Path("two")
