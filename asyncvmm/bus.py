"""The bus: which device answers at which I/O port or physical address, and behind which lock.

Devices are byte-wide, as the ISA's are; a wider access is its bytes, lowest address first, each answered by whatever
is attached there. Where nothing is attached, reads give all ones, as an undriven bus does, and the access is counted.

The bus takes the device's lock around every access. A vCPU's hot path may instead keep what ``lookup`` returns and do
the same itself. Devices are attached before the first vCPU runs and never change after that, so looking up needs no
lock. Writes to the counter may race; it is a statistic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final, Protocol

import attrs

from asyncvmm.errors import ConfigError

PORT_SPACE: Final = 1 << 16
MMIO_SPACE: Final = 1 << 52
"""Physical addresses x86-64 can have."""


class ByteDevice(Protocol):
    """What can be attached: registers one byte wide at offsets from 0. Nothing a guest writes may make it raise."""

    def read(self, offset: int) -> int:
        """The register's value, 0 to 255."""

    def write(self, offset: int, value: int) -> None:
        """Take ``value``, 0 to 255."""


@attrs.frozen
class Attachment:
    """A device at ``first`` .. ``first + size - 1``; its offset for an address is ``address - first``."""

    name: str
    first: int
    size: int
    device: ByteDevice
    lock: AbstractContextManager[object]

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.first + self.size


class AddressSpace:
    """Attachments of one space (ports or physical addresses), sorted, none overlapping."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._firsts: list[int] = []
        self._attachments: list[Attachment] = []
        self.unmapped = 0

    def __iter__(self) -> Iterator[Attachment]:
        return iter(self._attachments)

    def attach(self, attachment: Attachment) -> None:
        """Raises ConfigError for a range outside the space or one that overlaps another."""
        if not 0 <= attachment.first < attachment.end <= self._size:
            raise ConfigError("bus range", expected=f"within 0 to {self._size - 1:#x}", found=_span(attachment))
        index = bisect_right(self._firsts, attachment.first)
        for neighbour in self._attachments[max(index - 1, 0) : index + 1]:
            if attachment.first < neighbour.end and neighbour.first < attachment.end:
                raise ConfigError(f"bus range {_span(attachment)}", expected="a free one", found=_span(neighbour))
        self._firsts.insert(index, attachment.first)
        self._attachments.insert(index, attachment)

    def lookup(self, address: int) -> Attachment | None:
        """What is attached at ``address``."""
        index = bisect_right(self._firsts, address) - 1
        if index < 0:
            return None
        attachment = self._attachments[index]
        return attachment if address < attachment.end else None

    def read(self, address: int, size: int) -> int:
        """``size`` bytes from ``address`` on, little-endian. Unmapped ones are 0xff; an access counts once."""
        value = 0
        unmapped = False
        for index in range(size):
            attachment = self.lookup(address + index)
            if attachment is None:
                unmapped = True
                value |= 0xFF << 8 * index
            else:
                with attachment.lock:
                    value |= attachment.device.read(address + index - attachment.first) << 8 * index
        self.unmapped += unmapped
        return value

    def write(self, address: int, value: int, size: int) -> None:
        """Write ``size`` bytes of ``value`` from ``address`` on, little-endian. What is above ``size`` is cut off."""
        unmapped = False
        for index in range(size):
            attachment = self.lookup(address + index)
            if attachment is None:
                unmapped = True
            else:
                with attachment.lock:
                    attachment.device.write(address + index - attachment.first, value >> 8 * index & 0xFF)
        self.unmapped += unmapped


def _span(attachment: Attachment) -> str:
    return f"{attachment.name} at {attachment.first:#x} to {attachment.end - 1:#x}"


class Bus:
    """I/O ports and device memory of one VM."""

    def __init__(self) -> None:
        self._ports = AddressSpace(PORT_SPACE)
        self._mmio = AddressSpace(MMIO_SPACE)
        self._names: set[str] = set()

    @property
    def unmapped(self) -> int:
        """Accesses that met, wholly or in part, no device."""
        return self._ports.unmapped + self._mmio.unmapped

    def attach(
        self, name: str, first: int, size: int, device: ByteDevice, lock: AbstractContextManager[object]
    ) -> Attachment:
        """Answer I/O ports ``first`` .. ``first + size - 1`` by ``device``, with ``lock`` held around each access.

        ``name`` is the device's in snapshots. Raises ConfigError if a port is taken or does not exist, or if the name
        is taken.
        """
        return self._attach(self._ports, Attachment(name, first, size, device, lock))

    def attach_mmio(
        self, name: str, first: int, size: int, device: ByteDevice, lock: AbstractContextManager[object]
    ) -> Attachment:
        """As ``attach``, for physical addresses."""
        return self._attach(self._mmio, Attachment(name, first, size, device, lock))

    def _attach(self, space: AddressSpace, attachment: Attachment) -> Attachment:
        if attachment.name in self._names:
            raise ConfigError("bus attachment", expected="a name not yet taken", found=attachment.name)
        space.attach(attachment)
        self._names.add(attachment.name)
        return attachment

    def attachments(self) -> Iterator[Attachment]:
        """Everything attached: ports, then memory, each by address. Names are unique."""
        yield from self._ports
        yield from self._mmio

    def lookup(self, port: int) -> Attachment | None:
        """The device at an I/O port, for a caller that keeps the answer."""
        return self._ports.lookup(port)

    def lookup_mmio(self, address: int) -> Attachment | None:
        """The device at a physical address, for a caller that keeps the answer."""
        return self._mmio.lookup(address)

    def read(self, port: int, size: int) -> int:
        """An IN of ``size`` bytes (1, 2 or 4)."""
        return self._ports.read(port, size)

    def write(self, port: int, value: int, size: int) -> None:
        """An OUT of ``size`` bytes (1, 2 or 4)."""
        self._ports.write(port, value, size)

    def read_mmio(self, address: int, size: int) -> int:
        """A read of ``size`` bytes (1 to 8) at a physical address."""
        return self._mmio.read(address, size)

    def write_mmio(self, address: int, value: int, size: int) -> None:
        """A write of ``size`` bytes (1 to 8) at a physical address."""
        self._mmio.write(address, value, size)
