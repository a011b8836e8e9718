"""The bus: which device answers at which I/O port or physical address, and behind which lock.

Devices at ports are byte-wide, as the ISA's are; a wider access is its bytes, lowest address first, each answered by
whatever is attached there. Devices in memory take an access whole, as wide as it is. Where nothing is attached, reads
give all ones, as an undriven bus does, and the access is counted.

The bus takes the device's lock around every access. A vCPU's hot path may instead keep what ``lookup`` returns and do
the same itself. Devices are attached before the first vCPU runs and never change after that, so looking up needs no
lock; who watches a port where none is may come and go. Writes to the counter may race; it is a statistic.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, Generic, Protocol, TypeVar

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


class WordDevice(Protocol):
    """What can be attached in memory. Nothing a guest writes may make it raise."""

    def read(self, offset: int, size: int) -> int:
        """``size`` bytes (1 to 8) from ``offset`` on, little-endian."""

    def write(self, offset: int, value: int, size: int) -> None:
        """Take ``size`` bytes (1 to 8) at ``offset``; ``value`` has no more."""


D = TypeVar("D")


@attrs.frozen
class Attachment(Generic[D]):
    """A device at ``first`` .. ``first + size - 1``; its offset for an address is ``address - first``."""

    name: str
    first: int
    size: int
    device: D
    lock: AbstractContextManager[object]

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.first + self.size


class AddressSpace(Generic[D]):
    """Attachments of one space (ports or physical addresses), sorted, none overlapping."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._firsts: list[int] = []
        self._attachments: list[Attachment[D]] = []
        self.unmapped = 0

    def __iter__(self) -> Iterator[Attachment[D]]:
        return iter(self._attachments)

    def attach(self, attachment: Attachment[D]) -> None:
        """Raises ConfigError for a range outside the space or one that overlaps another."""
        if not 0 <= attachment.first < attachment.end <= self._size:
            raise ConfigError("bus range", expected=f"within 0 to {self._size - 1:#x}", found=_span(attachment))
        index = bisect_right(self._firsts, attachment.first)
        for neighbour in self._attachments[max(index - 1, 0) : index + 1]:
            if attachment.first < neighbour.end and neighbour.first < attachment.end:
                raise ConfigError(f"bus range {_span(attachment)}", expected="a free one", found=_span(neighbour))
        self._firsts.insert(index, attachment.first)
        self._attachments.insert(index, attachment)

    def lookup(self, address: int) -> Attachment[D] | None:
        """What is attached at ``address``."""
        index = bisect_right(self._firsts, address) - 1
        if index < 0:
            return None
        attachment = self._attachments[index]
        return attachment if address < attachment.end else None


class PortSpace(AddressSpace[ByteDevice]):
    """I/O ports."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._watched: dict[int, Callable[[int], None]] = {}

    def watch(self, port: int, tell: Callable[[int], None]) -> None:
        """Have ``tell`` called with each byte written there. Raises ConfigError where a device is."""
        attachment = self.lookup(port)
        if attachment is not None or not 0 <= port < self._size:
            found = "none such" if attachment is None else _span(attachment)
            raise ConfigError(f"watched port {port:#x}", expected="a port without a device", found=found)
        self._watched[port] = tell

    def unwatch(self, port: int) -> None:
        """End that."""
        self._watched.pop(port, None)

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
                if tell := self._watched.get(address + index):
                    tell(value >> 8 * index & 0xFF)
            else:
                with attachment.lock:
                    attachment.device.write(address + index - attachment.first, value >> 8 * index & 0xFF)
        self.unmapped += unmapped


class DeviceMemory(AddressSpace[WordDevice]):
    """Physical addresses that are not RAM. An access belongs to the device it begins at, if all of it does."""

    def read(self, address: int, size: int) -> int:
        """``size`` bytes from ``address`` on, little-endian; all ones where no one device has them all."""
        attachment = self.lookup(address)
        if attachment is None or address + size > attachment.end:
            self.unmapped += 1
            return (1 << 8 * size) - 1
        with attachment.lock:
            return attachment.device.read(address - attachment.first, size)

    def write(self, address: int, value: int, size: int) -> None:
        """Write ``size`` bytes of ``value``."""
        attachment = self.lookup(address)
        if attachment is None or address + size > attachment.end:
            self.unmapped += 1
            return
        with attachment.lock:
            attachment.device.write(address - attachment.first, value, size)


def _span(attachment: Attachment[D]) -> str:
    return f"{attachment.name} at {attachment.first:#x} to {attachment.end - 1:#x}"


class Bus:
    """I/O ports and device memory of one VM."""

    def __init__(self) -> None:
        self._ports = PortSpace(PORT_SPACE)
        self._mmio = DeviceMemory(MMIO_SPACE)
        self._names: set[str] = set()

    @property
    def unmapped(self) -> int:
        """Accesses that met, wholly or in part, no device."""
        return self._ports.unmapped + self._mmio.unmapped

    def attach(
        self, name: str, first: int, size: int, device: ByteDevice, lock: AbstractContextManager[object]
    ) -> Attachment[ByteDevice]:
        """Answer I/O ports ``first`` .. ``first + size - 1`` by ``device``, with ``lock`` held around each access.

        ``name`` is the device's in snapshots. Raises ConfigError if a port is taken or does not exist, or if the name
        is taken.
        """
        attachment = Attachment(name, first, size, device, lock)
        self._take(name, lambda: self._ports.attach(attachment))
        return attachment

    def attach_mmio(
        self, name: str, first: int, size: int, device: WordDevice, lock: AbstractContextManager[object]
    ) -> Attachment[WordDevice]:
        """As ``attach``, for physical addresses."""
        attachment = Attachment(name, first, size, device, lock)
        self._take(name, lambda: self._mmio.attach(attachment))
        return attachment

    def _take(self, name: str, attach: Callable[[], None]) -> None:
        if name in self._names:
            raise ConfigError("bus attachment", expected="a name not yet taken", found=name)
        attach()
        self._names.add(name)

    def attachments(self) -> Iterator[Attachment[Any]]:
        """Everything attached: ports, then memory, each by address. Names are unique."""
        yield from self._ports
        yield from self._mmio

    def watch(self, port: int, tell: Callable[[int], None]) -> None:
        """Have ``tell`` called, on the vCPU's thread and without a lock, with each byte written to an I/O port at which
        no device is; one before it is no longer. May be called while the guest runs. Raises ConfigError.
        """
        self._ports.watch(port, tell)

    def unwatch(self, port: int) -> None:
        """Call nothing for that port any more."""
        self._ports.unwatch(port)

    def lookup(self, port: int) -> Attachment[ByteDevice] | None:
        """The device at an I/O port, for a caller that keeps the answer."""
        return self._ports.lookup(port)

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
