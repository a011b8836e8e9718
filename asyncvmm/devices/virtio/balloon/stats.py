"""The guest's memory statistics: BalloonStats, and the tagged values that a driver sends.

Facts: virtio 1.2, section 5.5.6.3 and 5.5.6.4 (packed ``le16 tag, le64 value`` entries; a device ignores tags that it
does not know). Field names are those of Firecracker's balloon statistics.
"""

from __future__ import annotations

import struct

import attrs

PAGES_PER_MIB = 256
"""Balloon pages are of 4 KiB, whatever the guest's pages are."""

MOST_ENTRIES = 64
"""Entries looked at in one buffer; there are ten tags."""

_ENTRY = struct.Struct("<HQ")

MOST_BYTES = MOST_ENTRIES * _ENTRY.size


@attrs.frozen(kw_only=True)
class BalloonStats:
    """What a guest says of its memory, and its balloon. None: it did not say.

    target_pages, target_mib: the size asked for, in pages of 4 KiB and in whole MiB. actual_pages, actual_mib: the
    size that the guest says it has. swap_in, swap_out: bytes read from swap and written to it since boot. major_faults,
    minor_faults: page faults since boot. free_memory, total_memory, available_memory, disk_caches: bytes.
    hugetlb_allocations, hugetlb_failures: huge pages got, and not got, since boot.
    """

    target_pages: int
    actual_pages: int
    swap_in: int | None = None
    swap_out: int | None = None
    major_faults: int | None = None
    minor_faults: int | None = None
    free_memory: int | None = None
    total_memory: int | None = None
    available_memory: int | None = None
    disk_caches: int | None = None
    hugetlb_allocations: int | None = None
    hugetlb_failures: int | None = None

    @property
    def target_mib(self) -> int:
        """Whole MiB asked for."""
        return self.target_pages // PAGES_PER_MIB

    @property
    def actual_mib(self) -> int:
        """Whole MiB in the balloon."""
        return self.actual_pages // PAGES_PER_MIB

    def to_dict(self) -> dict[str, int]:
        """Every field that has a value, by its name, ``target_mib`` and ``actual_mib`` with them."""
        sizes = {"target_mib": self.target_mib, "actual_mib": self.actual_mib}
        return sizes | {name: value for name, value in attrs.asdict(self).items() if value is not None}


STATISTICS = tuple(field.name for field in attrs.fields(BalloonStats) if field.default is None)
"""The statistics' names; each stands at the place that is its tag."""


def parse_statistics(data: bytes) -> dict[str, int]:
    """The values that a driver's buffer holds, by name; a repeated tag keeps the last one, an unknown one is ignored.

    Raises ValueError for a buffer that is not whole entries, or more than MOST_ENTRIES of them.
    """
    count, rest = divmod(len(data), _ENTRY.size)
    if rest or count > MOST_ENTRIES:
        raise ValueError(f"expected at most {MOST_ENTRIES} entries of {_ENTRY.size} bytes, found {len(data)} bytes")
    return {STATISTICS[tag]: value for tag, value in _ENTRY.iter_unpack(data) if tag < len(STATISTICS)}
