from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.snapshot.resources import MAX_HEARTBEAT, MAX_MS, SnapshotResources


@pytest.mark.parametrize(
    "armed", [{"after_ms": 0}, {"at_heartbeat": 1}, {"on_listener": True}, {"on_pre_exec": True}], ids=str
)
def test_one_thing_armed_is_enough(armed: dict[str, Any]) -> None:
    resources = SnapshotResources(**armed)
    assert resources.quiesce_ms == 0
    assert resources.out_path is None


@pytest.mark.parametrize("rest", [{}, {"quiesce_ms": 5}, {"out_path": "s"}, {"on_listener": False}], ids=str)
def test_nothing_armed_is_refused(rest: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing armed"):
        SnapshotResources(**rest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"after_ms": -1},
        {"after_ms": MAX_MS + 1},
        {"after_ms": 1.5},
        {"after_ms": True},
        {"after_ms": "5"},
        {"at_heartbeat": 0},
        {"at_heartbeat": MAX_HEARTBEAT + 1},
        {"at_heartbeat": False},
        {"on_listener": 1},
        {"on_pre_exec": None},
        {"on_pre_exec": True, "or_parked": "no"},
        {"on_pre_exec": True, "quiesce_ms": -1},
        {"on_pre_exec": True, "quiesce_ms": None},
        {"on_pre_exec": True, "out_path": ""},
        {"on_pre_exec": True, "out_path": "a\0b"},
        {"on_pre_exec": True, "out_path": "\udfff"},
        {"on_pre_exec": True, "out_path": 5},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SnapshotResources(**wrong)


def test_it_is_a_record_with_a_path() -> None:
    resources = SnapshotResources(on_pre_exec=True, quiesce_ms=10, out_path="snapshots/one")
    assert resources.out_path == Path("snapshots/one")
    assert resources == attrs.evolve(resources)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        resources.quiesce_ms = 1  # type: ignore[misc]
