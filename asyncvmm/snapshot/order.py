"""SnapshotOrder: one snapshot as it was asked for, checked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from asyncvmm.config import can_be_path
from asyncvmm.errors import ConfigError
from asyncvmm.snapshot.resources import SnapshotResources

if TYPE_CHECKING:
    from asyncvmm.snapshot.predicate import Predicate
    from asyncvmm.snapshot.snapshot import Snapshot

Then = Literal["resume", "stop"]


def _path(value: object) -> Path | None:
    if value is None:
        return None
    if value == "" or not isinstance(value, str | os.PathLike) or not can_be_path(os.fspath(value)):
        raise ConfigError("snapshot path", expected="a path that a directory can have", found=repr(value))
    return Path(value)


def _check_when(_: object, __: object, value: Any) -> None:
    from asyncvmm.snapshot.predicate import Predicate

    if value is not None and not isinstance(value, SnapshotResources | Predicate):
        raise ConfigError("when", expected="SnapshotResources or a predicate", found=repr(value)[:80])


def _check_base(_: object, __: object, value: Any) -> None:
    from asyncvmm.snapshot.snapshot import Snapshot

    if value is not None and not isinstance(value, Snapshot):
        raise ConfigError("base", expected="a Snapshot", found=repr(value)[:80])


def _check_precopy(_: object, __: object, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError("precopy", expected="True or False", found=repr(value)[:80])


def _check_then(_: object, __: object, value: object) -> None:
    if value not in get_args(Then):
        raise ConfigError("then", expected=" or ".join(get_args(Then)), found=repr(value))


@attrs.frozen(kw_only=True)
class SnapshotOrder:
    """when: what it waits for; None for nothing. out: its directory; None takes what ``when`` says, else one that dies
    with the Snapshot. base: only what changed since that snapshot is saved. precopy: memory is copied while the guest
    runs, so that it stands still for less time. then: what becomes of the VM.

    Raises ConfigError.
    """

    when: SnapshotResources | Predicate | None = attrs.field(default=None, validator=_check_when)
    out: Path | None = attrs.field(default=None, converter=_path)
    base: Snapshot | None = attrs.field(default=None, validator=_check_base)
    precopy: bool = attrs.field(default=False, validator=_check_precopy)
    then: Then = attrs.field(default="resume", validator=_check_then)

    @property
    def quiesce_ms(self) -> int:
        """How long to wait once it has fired, ms."""
        return self.when.quiesce_ms if isinstance(self.when, SnapshotResources) else 0

    @property
    def directory(self) -> Path | None:
        """Where it goes; None for a place of its own."""
        if self.out is None and isinstance(self.when, SnapshotResources):
            return self.when.out_path
        return self.out

    @property
    def wants_pre_exec(self) -> bool:
        """Whether PID 1 is to hold the workload for it."""
        if isinstance(self.when, SnapshotResources):
            return self.when.on_pre_exec
        return self.when is not None and self.when.wants_pre_exec

    @property
    def needs_pre_exec(self) -> bool:
        """Whether nothing comes of it once the workload was let run."""
        if self.when is None or isinstance(self.when, SnapshotResources):
            return self.wants_pre_exec
        return self.when.needs_pre_exec
