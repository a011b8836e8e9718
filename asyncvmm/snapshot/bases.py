"""Bases: which snapshot the next difference of a VM can be of. What is written is kept account of since one alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from asyncvmm.errors import ConfigError, SnapshotFailed, StateError
from asyncvmm.snapshot.order import SnapshotOrder

if TYPE_CHECKING:
    from asyncvmm.snapshot.snapshot import Snapshot
    from asyncvmm.vm import VM


class Bases:
    """Of one VM: the snapshot it was saved to last, or, before there is one, the snapshot it was made of."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._last: tuple[str, Path] | None = None

    def saved_to(self, snapshot: Snapshot) -> None:
        """That one is the last now."""
        self._last = (snapshot.id, snapshot.path)

    def check(self, order: SnapshotOrder) -> None:
        """Raises StateError, ConfigError and SnapshotFailed if its base is none for a difference of this VM."""
        vm, base = self._vm, order.base
        if base is None:
            return
        if base.closed:
            raise StateError("snapshot base", expected="an open one", state="closed")
        if base.is_temporary and order.directory is not None:
            raise ConfigError("snapshot base", expected="one that has a place of its own", found="a temporary one")
        accel = vm.accel or vm.config.accel
        if accel == "qemu" or (accel == "auto" and base.manifest.machine == "qemu"):
            expected = "none on QEMU, where every snapshot is of all memory"
            raise SnapshotFailed("snapshot base", expected=expected, found=base.path)
        if accel == "kvm" and base.manifest.machine != "kvm":
            raise SnapshotFailed("snapshot base", expected="one of kvm", found=base.manifest.machine)
        self._check_account(base)

    def _check_account(self, base: Snapshot) -> None:
        if not self._vm.config.track_dirty:
            expected = "a VM with track_dirty=True (of its VMConfig, or of VM.restore)"
            raise SnapshotFailed("snapshot base", expected=expected, found="one without")
        last = self._last or self._made_of()
        if last is None:
            expected = "this VM's last snapshot, and it has none: take one without base= first"
            raise SnapshotFailed("snapshot base", expected=expected, found=base.path)
        if last[0] != base.id:
            expected = f"this VM's last snapshot, {last[1]} (or no base=, to save all of it)"
            raise SnapshotFailed("snapshot base", expected=expected, found=base.path)

    def _made_of(self) -> tuple[str, Path] | None:
        restoring = self._vm._restoring
        return None if restoring is None else (restoring.snapshot.id, restoring.snapshot.path)
