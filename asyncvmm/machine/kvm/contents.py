"""What a new VM is filled with: segments, which the chain that creates it copies, and a file, which it reads.

Where they go is part of a VM's shape, decided when the chain is written down; where they come from is given to each
run of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from asyncvmm.machine.kvm.fastpath.chain import Argument, At, Chain, SystemCall
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.memory import offset_of
from asyncvmm.x86.cpu import BootCpu
from asyncvmm.x86.layout import Region
from asyncvmm.x86.load import Segment

READ_INITRD = "read of the initrd"
"""The step that an unreadable file fails."""

_SMALL_BYTES = 1 << 14
"""Segments up to that size are gathered before: asking where bytes lie takes longer than copying a few."""

Place = tuple[int, int]
"""Guest-physical address and size."""


@attrs.frozen
class Contents:
    """What is in memory when the guest starts, and the first vCPU's state.

    ``segments`` are the kernel's, ``parameters`` what its boot protocol wants besides. ``initrd_fd`` is an open file of
    which ``initrd_size`` bytes go to ``initrd_address``; 0 bytes for none.
    ``appended`` goes behind them and counts as part of the initrd.
    """

    cpu: BootCpu
    segments: tuple[Segment, ...]
    appended: tuple[Segment, ...] = ()
    initrd_fd: int = -1
    initrd_address: int = 0
    initrd_size: int = 0
    parameters: tuple[Segment, ...] = ()

    def shape(self) -> Shape:
        """What VMs filled with the like have in common."""
        return Shape(
            self.cpu,
            _places(self.segments),
            _places(self.parameters),
            _places(self.appended),
            (self.initrd_address, self.initrd_size),
        )

    def sources(self) -> list[Pinned]:
        """Where the segments' bytes lie: the gathered small ones, then each large one."""
        data = [segment.data for segment in (*self.appended, *self.segments, *self.parameters)]
        gathered = b"".join([part for part in data if len(part) <= _SMALL_BYTES])
        return [Pinned(gathered), *(Pinned(part) for part in data if len(part) > _SMALL_BYTES)]


def _places(segments: Sequence[Segment]) -> tuple[Place, ...]:
    return tuple([(segment.address, len(segment.data)) for segment in segments])


@attrs.frozen
class Shape:
    """Contents without their bytes. Hashable: VMs of one shape are created by one chain."""

    cpu: BootCpu
    segments: tuple[Place, ...]
    parameters: tuple[Place, ...]
    appended: tuple[Place, ...]
    initrd: Place

    @property
    def sources(self) -> int:
        """How many addresses ``Contents.sources`` gives."""
        return 1 + sum(size > _SMALL_BYTES for _, size in (*self.appended, *self.segments, *self.parameters))


class Loader:
    """Writes the loading down. ``fd`` is the initrd's descriptor, ``sources`` are the segments' addresses."""

    def __init__(
        self, chain: Chain, memory: At, regions: Sequence[Region], fd: Argument, sources: Sequence[At]
    ) -> None:
        self._chain = chain
        self._memory = memory
        self._regions = regions
        self._fd = fd
        self._small, *self._large = sources

    def load(self, shape: Shape) -> At | None:
        """Append all steps; gives how much of an initrd was read. Raises ConfigError for what is not to be RAM."""
        with self._chain.phase("rootfs_load"):
            read = self._read(*shape.initrd) if shape.initrd[1] else None
            self._copy(shape.appended)
        with self._chain.phase("kernel_load"):
            self._copy(shape.segments)
        with self._chain.phase("boot_params"):
            self._copy(shape.parameters)
        return read

    def _read(self, address: int, size: int) -> At:
        return self._chain.call(READ_INITRD, SystemCall.PREAD64, self._fd, self._host(address, size), size, 0)

    def _copy(self, places: Sequence[Place]) -> None:
        for address, size in places:
            if size <= _SMALL_BYTES:
                source, self._small = self._small, self._small + size
            else:
                source = self._large.pop(0)
            self._chain.copy(self._host(address, size), source, size)

    def _host(self, address: int, size: int) -> At:
        return self._memory + offset_of(self._regions, address, size)
