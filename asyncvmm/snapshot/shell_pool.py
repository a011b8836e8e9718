"""ShellPool: VMs made ahead, with memslots and vCPUs, for restores that have no time to make one (KVM alone).

async with ShellPool(snapshot, size=4) as shells:
    vm = await VM.restore(snapshot, shells=shells)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncvmm.snapshot.snapshot import Snapshot


class ShellPool:
    """Keeps ``size`` shells for restores of ``snapshot``, and of others of the same shape."""

    def __init__(self, snapshot: Snapshot, size: int = 1) -> None:
        self.size = size
        self._snapshot = snapshot
