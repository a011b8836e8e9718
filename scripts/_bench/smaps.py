"""What this process has in memory, apart for guests and for everything else, and what the kernel has. See proc(5)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import attrs

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)")
_COUNTED = {
    "guests": ("Anonymous:",),
    "vcpus": ("Private_Clean:", "Private_Dirty:"),
    "ours": ("Private_Clean:", "Private_Dirty:"),
}
"""Of a guest, what it has written: its file's pages that nobody else maps at the moment are not its own."""

_KERNEL = ("Slab", "KernelStack", "PageTables", "SecPageTables", "Percpu", "VmallocUsed")
"""Of /proc/meminfo: what a VM has in the kernel. It is the whole host's: differences of it are of the whole host."""


@attrs.frozen
class Memory:
    """KiB. guests: the guests' own pages. vcpus: the kernel's pages that vCPUs share with us. ours: all other private
    pages of this process."""

    guests: int
    vcpus: int
    ours: int


NO_MEMORY = Memory(0, 0, 0)


def private_memory(guests: Iterable[tuple[int, int]]) -> Memory:
    """Now. ``guests``: first address and size of each guest's memory."""
    ranges = sorted((address, address + size) for address, size in guests)
    found = {"guests": 0, "vcpus": 0, "ours": 0}
    kind = "ours"
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := _MAPPING.fullmatch(line):
            start, name = int(mapping[1], 16), mapping[3]
            kind = _kind(start, name, ranges)
        elif line.startswith(_COUNTED[kind]):
            found[kind] += int(line.split()[1])
    return Memory(**found)


def kernel_memory() -> dict[str, int]:
    """KiB by name, of the whole host."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(words[0]) for label, *words in lines if (name := label.rstrip(":")) in _KERNEL}


def _kind(start: int, name: str, guests: list[tuple[int, int]]) -> str:
    if name.startswith("anon_inode:kvm-vcpu"):
        return "vcpus"
    return "guests" if any(first <= start < end for first, end in guests) else "ours"
