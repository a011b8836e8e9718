"""SnapshotResources: when to take a snapshot, as a caller asks for it. Checked at once, without the guest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from asyncvmm.config import can_be_path
from asyncvmm.errors import ConfigError

MAX_MS = 1 << 40
"""Longest time taken, in milliseconds: 35 years."""

MAX_HEARTBEAT = (1 << 64) - 1
"""Largest count that a guest can come to."""


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """Refuse what is not a whole number of that range. Raises ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(name, expected=f"a whole number, {least} to {most}", found=repr(value))


def _check_ms(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    check_whole(attribute.name, value, 0, MAX_MS)


def _check_heartbeat(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    check_whole(attribute.name, value, 1, MAX_HEARTBEAT)


def _check_bool(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(attribute.name, expected="True or False", found=repr(value))


def _path(value: Any) -> Path | None:
    if value is None:
        return None
    try:
        path = Path(value)
    except TypeError:
        raise ConfigError("out_path", expected="a path", found=repr(value)) from None
    if not str(value) or not can_be_path(str(path)):
        raise ConfigError("out_path", expected="a path that a directory can have", found=repr(value))
    return path


@attrs.frozen(kw_only=True)
class SnapshotResources:
    """When to take a snapshot: at the first that comes of what is armed.

    after_ms: milliseconds after READY, or after the call if that is later. at_heartbeat: once PID 1 has counted that
    far. on_listener: once something in the guest listens on a port. on_pre_exec: one step before the workload runs; it
    wins over on_listener. If one of these two is armed and cannot come any more, as the workload has ended, that counts
    as having come (``parked``); with ``or_parked=False`` it does not, and a snapshot that waits for nothing else is
    impossible then.

    quiesce_ms: milliseconds that the guest runs on before it is stopped and saved. out_path: the snapshot's directory;
    None leaves the choice to who takes it.

    Raises ConfigError at construction, also if nothing is armed.
    """

    after_ms: int | None = attrs.field(default=None, validator=attrs.validators.optional(_check_ms))
    at_heartbeat: int | None = attrs.field(default=None, validator=attrs.validators.optional(_check_heartbeat))
    on_listener: bool = attrs.field(default=False, validator=_check_bool)
    on_pre_exec: bool = attrs.field(default=False, validator=_check_bool)
    or_parked: bool = attrs.field(default=True, validator=_check_bool)
    quiesce_ms: int = attrs.field(default=0, validator=_check_ms)
    out_path: Path | None = attrs.field(default=None, converter=_path)

    def __attrs_post_init__(self) -> None:
        timed = self.after_ms is not None or self.at_heartbeat is not None
        if not timed and not self.on_listener and not self.on_pre_exec:
            expected = "after_ms, at_heartbeat, on_listener or on_pre_exec"
            raise ConfigError("SnapshotResources", expected=expected, found="nothing armed")
