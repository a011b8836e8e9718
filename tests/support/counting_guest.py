"""The guest memory.S, in memory of a size that no other mapping has, saved after it has counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.memory_guest import Files, MemoryGuest, New, Save, booted, new_guest

MEMORY_MIB = 67
"""A size that no other mapping has."""

RAM = MEMORY_MIB << 20


def counting(kernel: Path) -> New:
    """``new_guest`` for it, in memory of that size."""

    def make(**options: Any) -> MemoryGuest:
        return new_guest(kernel, **{"memory_mib": MEMORY_MIB, **options})

    return make


async def saved_guest(new: New, files: Files, **options: Any) -> Save:
    """One that has counted to 2 and written pages 5000 to 5099."""
    async with booted(new(**options)) as guest:
        assert await guest.count() == 1
        assert await guest.count() == 2
        await guest.fill(5000, 100, 7)
        await guest.machine.pause()
        return await files.save(guest)
