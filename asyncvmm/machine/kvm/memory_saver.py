"""A VM's memory on its way to a snapshot's file: all of it, or what was written since an earlier one; in part ahead.

Only pages that exist are looked at: those that this process has of its own, and those that a restored VM's files hold.
With ``tracked`` every write is accounted for from the VM's first moment: there are differences then. Without, the dirty
log is on from ``precopy`` to ``settle`` only.

All of it blocks, and is for one thread at a time, ``saved_as`` excepted, which may come in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.kvm.dirty import DirtyLog
from asyncvmm.machine.kvm.memory import GuestMemory
from asyncvmm.machine.kvm.pagemap import pages_of
from asyncvmm.machine.kvm.pages import PageSet, total
from asyncvmm.machine.kvm.working_set import can_be_read
from asyncvmm.snapshot.memory_map import PAGE_BYTES, Run

if TYPE_CHECKING:
    from asyncvmm.snapshot.memory_writer import MemoryWriter

MOST_PASSES: Final = 8
"""Copies of what was written during the one before."""

SMALL_BYTES: Final = 1 << 18
"""What is left of it then is not worth another pass."""

_PIECE_BYTES: Final = 1 << 22
"""Bytes copied at a time: some milliseconds, after which one looks whether to go on."""

Proceed = Callable[[], None]
"""Raises what is to end the copying."""


class MemorySaver:
    """Copies ``memory``. ``held``: runs that files hold of a restored VM's memory; None for a VM that was booted.

    tracked: ``log`` is on, and stays on.
    """

    def __init__(
        self, memory: GuestMemory, log: DirtyLog, *, tracked: bool = False, held: Iterable[Run] | None = None
    ) -> None:
        self._memory = memory
        self._log = log
        self._tracked = tracked
        self._held = tuple(held or ())
        self._base: str | None = None
        self._nameable = held is not None
        size = memory.size if tracked else 0
        self._changed = PageSet(size)  # since _base
        self._since = PageSet(size)  # since what was saved last
        self._ahead: MemoryWriter | None = None  # what precopy wrote to
        self._rest = PageSet(0)  # since precopy wrote it

    def precopy(self, writer: MemoryWriter, proceed: Proceed) -> None:
        """Copy while the guest runs, until little is left or it does not get less. Raises SnapshotFailed."""
        self._ahead = None
        try:
            self._log.begin()
            self._collect()
            self._ahead, self._rest = writer, PageSet(self._memory.size)
            runs = self._changed.runs() if writer.is_difference and self._tracked else self._existing()
            for _ in range(MOST_PASSES):
                self._copy(writer, runs, proceed)
                self._collect()
                left = len(self._rest) * PAGE_BYTES
                if left <= SMALL_BYTES or left >= total(runs):
                    break
                runs = self._rest.take()
        except BaseException:
            self._ahead, self._rest = None, PageSet(0)
            raise

    def save(self, writer: MemoryWriter, difference_of: str | None, proceed: Proceed) -> None:
        """Copy what ``precopy`` left, or everything; of a difference what has changed. No vCPU runs.

        Raises SnapshotFailed; what has changed is not forgotten then.
        """
        self._check(difference_of)
        self._collect()
        if writer is self._ahead:
            runs = self._rest.runs()
        else:
            runs = self._existing() if difference_of is None else self._changed.runs()
        self._ahead, self._rest = None, PageSet(0)
        self._copy(writer, runs, proceed)
        self._since = PageSet(self._memory.size if self._tracked else 0)
        self._nameable = True

    def saved_as(self, name: str) -> None:
        """What was saved last has that name; of a restored VM that has not been saved yet, what it was restored from.

        Without a save whose writes are tracked, there will be no difference of it.
        """
        if self._nameable and self._tracked:
            self._base = name
            self._changed, self._since = self._since, PageSet(self._memory.size)

    @property
    def is_settled(self) -> bool:
        """Whether the dirty log is on only if it is wanted."""
        return self._tracked or not self._log.is_on or self._ahead is not None

    def settle(self) -> None:
        """Have the dirty log on only if it is wanted. Raises KvmIoctlError."""
        if not self.is_settled:
            self._log.end()

    def _check(self, difference_of: str | None) -> None:
        if difference_of is None:
            return
        if not self._tracked:
            raise SnapshotFailed("a difference", expected="a VM whose writes are tracked", found="one whose are not")
        if difference_of != self._base:
            known = self._base or "nothing saved yet"
            raise SnapshotFailed("a difference", expected=f"of {known}", found=f"of {difference_of}")

    def _collect(self) -> None:
        """Bring the sets up to date."""
        if self._log.is_on:
            wanted = (self._changed, self._since) if self._tracked else ()
            self._log.collect([*wanted, self._rest] if self._ahead is not None else wanted)

    def _existing(self) -> list[Run]:
        _, own = pages_of(self._memory.host_address, self._memory.size)
        own.add_runs(self._held)
        return own.runs()

    def _copy(self, writer: MemoryWriter, runs: Sequence[Run], proceed: Proceed) -> None:
        view = self._memory.view
        for piece in _pieces(runs):
            proceed()
            if self._held and not can_be_read(self._memory, piece):
                raise SnapshotFailed("guest memory", expected="the file it was restored from", found="one cut off")
            writer.write_runs(view, piece)


def _pieces(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """The same in lists of up to _PIECE_BYTES: one of many single pages is as short as a large run's part."""
    piece, room = list[Run](), _PIECE_BYTES
    for offset, size in runs:
        while size:
            part = min(size, room)
            piece.append((offset, part))
            offset, size, room = offset + part, size - part, room - part
            if not room:
                yield piece
                piece, room = [], _PIECE_BYTES
    if piece:
        yield piece
