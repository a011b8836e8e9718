"""Guest RAM under observation: what it was, what may have changed, and a guest that changes it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from asyncvmm.devices.virtio.memory import GuestView
from tests.fuzz.reference import Range

HIGH = 1 << 32
HIGH_BYTES = 0x1000
"""A second region, far behind the first and not joined to it."""


class Region:
    """Bytes of RAM and their shadow: what they have to be, as far as the device has nothing to do with them."""

    def __init__(self, start: int, memory: bytearray) -> None:
        self.start = start
        self.memory = memory
        self.shadow = bytearray(memory)

    def part(self, address: int, size: int) -> slice | None:
        """What of a range lies here."""
        first, last = max(address, self.start), min(address + size, self.start + len(self.memory))
        return slice(first - self.start, last - self.start) if first < last else None

    def holds(self, address: int, size: int) -> bool:
        """Whether all of it lies here."""
        return self.start <= address and address + size <= self.start + len(self.memory)


class ObservedView(GuestView):
    """The device's view of RAM, which lets a guest strike whenever the device looks at an address, or fences."""

    def __init__(self, memory: bytearray) -> None:
        self.regions = [Region(0, memory), Region(HIGH, bytearray(HIGH_BYTES))]
        self.marked: list[Range] = []
        self.strikes: list[tuple[int, bytes]] = []
        super().__init__(
            [(region.start, memoryview(region.memory)) for region in self.regions],
            lambda address, size: self.marked.append((address, size)),
            self._strike,
        )

    def view(self, address: int, size: int) -> memoryview:
        """As GuestView."""
        found = super().view(address, size)
        self._strike()
        return found

    def _strike(self) -> None:
        if self.strikes:
            self.guest_writes(*self.strikes.pop())

    def guest_writes(self, address: int, data: bytes) -> None:
        """The guest changes its memory, as far as it is."""
        for region in self.regions:
            if (part := region.part(address, len(data))) is not None:
                at = region.start + part.start - address
                region.memory[part] = region.shadow[part] = data[at : at + part.stop - part.start]

    def guest_reads(self, address: int, size: int) -> bytes | None:
        """What is there; None unless all of it is RAM."""
        for region in self.regions:
            if region.holds(address, size):
                return bytes(region.memory[address - region.start : address - region.start + size])
        return None

    def sync(self) -> None:
        """Whatever there is now was the guest's own doing."""
        self.marked.clear()
        for region in self.regions:
            region.shadow[:] = region.memory

    def check(self, allowed: Iterable[Range], unmarked: Iterable[Range]) -> None:
        """Nothing but ``allowed`` has changed, nothing but ``unmarked`` without a mark. What is, is the new truth."""
        for region in self.regions:
            if region.memory != region.shadow:
                _accept(region, [*self.marked, *unmarked], "is not marked dirty")
                _accept(region, allowed, "was written to, and never offered", keep=True)
        self.marked.clear()


def _accept(region: Region, ranges: Iterable[Range], objection: str, *, keep: bool = False) -> None:
    expected = bytearray(region.shadow)
    for address, size in ranges:
        if (part := region.part(address, size)) is not None:
            expected[part] = region.memory[part]
    if expected != region.memory:
        at = next(at for at, (was, now) in enumerate(zip(expected, region.memory, strict=True)) if was != now)
        raise AssertionError(f"the byte at {region.start + at:#x} {objection}")
    if keep:
        region.shadow[:] = expected
