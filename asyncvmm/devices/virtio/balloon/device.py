"""The memory balloon (virtio 1.2, section 5.5): pages that the guest hands over, and asks for no more.

Inflating, free page reporting and free page hinting all end the same way: ranges of guest memory go to the backend,
which gives their pages back to the host before the guest hears of it. A page taken back reads as zeros. There is no
work for deflating: a page comes back by being touched, so VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered.

Hinted pages are the guest's until it says so twice: Linux may use one again between naming it and our seeing it, when
it runs out of memory. So hinting is best asked of a guest that is not short of it.

Each queue's number depends on the features (5.5.2), and drivers disagree on how: by the specification a queue that is
not there leaves its number empty, Linux closes the gap. The queues that the driver has made ready tell which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Protocol

from asyncvmm.device_config import BalloonConfig
from asyncvmm.devices.checks import boolean, entry, integer, shown
from asyncvmm.devices.virtio import ids
from asyncvmm.devices.virtio.balloon.pages import (
    MOST_PFNS,
    Range,
    coalesce,
    cut,
    parse_pfns,
    total,
    whole_pages,
    within_ram,
)
from asyncvmm.devices.virtio.balloon.stats import MOST_BYTES, PAGES_PER_MIB, STATISTICS, BalloonStats, parse_statistics
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.queue import Chain, Queue
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import BalloonMetrics

VIRTIO_BALLOON_F_STATS_VQ: Final = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM: Final = 2
VIRTIO_BALLOON_F_FREE_PAGE_HINT: Final = 3
VIRTIO_BALLOON_F_PAGE_REPORTING: Final = 5

INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = range(5)
QUEUE_SIZES: Final = (128, 128, 2, 256, 256)

NUM_PAGES, ACTUAL, FREE_PAGE_HINT_CMD_ID = 0, 4, 8
CONFIG_BYTES: Final = 12

CMD_ID_STOP: Final = 0
CMD_ID_DONE: Final = 1
CMD_ID_FIRST: Final = 2

MOST_CHAINS: Final = 16
"""Requests handled in one go, if they are not of many parts."""

MOST_RELEASED: Final = 32 << 20
"""Bytes given back in one go: freeing 8192 pages takes milliseconds."""

MOST_RANGES: Final = 1024
"""Ranges given back in one go: each is a system call or two."""

_WORD: Final = (1 << 32) - 1
_NEEDED: Final = {
    STATS: VIRTIO_BALLOON_F_STATS_VQ,
    FREE_PAGE: VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    REPORTING: VIRTIO_BALLOON_F_PAGE_REPORTING,
}


class BalloonBackend(Protocol):
    """Gives pages back to the host."""

    def release(self, ranges: list[Range]) -> int:
        """Give back these ranges of whole pages in RAM, which read as zeros from then on. Returns how many bytes were.

        Called on the loop with the device's lock held; it must not raise.
        """


class _Release:
    """One request whose pages are on their way to the host. ``rest``: what is still to be given back."""

    __slots__ = ("chain", "failed", "freed", "rest")

    def __init__(self, chain: Chain, rest: list[Range], failed: int) -> None:
        self.chain = chain
        self.rest = rest
        self.failed = failed
        self.freed = 0


class VirtioBalloon(VirtioDevice):
    """One balloon. ``on_stats`` and ``on_hinted`` are called on the loop, with the lock held: statistics have come; the
    guest has named all its free pages. ``hinted_bytes``: given back by the newest hinting."""

    device_id: ClassVar[int] = ids.BALLOON
    metrics: BalloonMetrics

    def __init__(
        self,
        config: BalloonConfig,
        ram: Sequence[tuple[int, int]],
        backend: BalloonBackend,
        metrics: BalloonMetrics,
    ) -> None:
        """``ram``: each region's first guest address and the one behind it (GuestView.ranges)."""
        super().__init__(QUEUE_SIZES, _features(config), bytes(CONFIG_BYTES), metrics)
        self.on_stats: Callable[[], None] = _nothing
        self.on_hinted: Callable[[], None] = _nothing
        self.hinted_bytes = 0
        self._ram = tuple(ram)
        self._backend = backend
        self._statistics: dict[str, int] = {}
        self._last_cmd_id = CMD_ID_DONE
        self._parts: dict[int, int] = {}
        self._stats_queue: Queue | None = None
        self._held: Chain | None = None
        self._releases: dict[int, _Release] = {}
        self._hinting = False
        self._set_word(NUM_PAGES, min(config.mib * PAGES_PER_MIB, _WORD))

    # -- what the host asks and is told, within a session ----------------------------------------------------------

    @property
    def target_pages(self) -> int:
        """The size asked for."""
        return self._word(NUM_PAGES)

    @property
    def actual_pages(self) -> int:
        """The size that the guest says it is."""
        return self._word(ACTUAL)

    @property
    def has_stats(self) -> bool:
        """Whether the driver gives statistics."""
        return self._stats_queue is not None and self._stats_queue.ready

    @property
    def has_hinting(self) -> bool:
        """Whether the driver can be asked for its free pages."""
        return self.has(VIRTIO_BALLOON_F_FREE_PAGE_HINT)

    def set_target_pages(self, pages: int) -> None:
        """Ask for a balloon of that many pages of 4 KiB; the field ends 4 KiB short of 16 TiB."""
        self._set_word(NUM_PAGES, min(pages, _WORD))
        self.config_changed()

    def stats(self) -> BalloonStats:
        """The newest statistics, as far as there are any."""
        return BalloonStats(target_pages=self.target_pages, actual_pages=self.actual_pages, **self._statistics)

    def request_stats(self) -> bool:
        """Ask for new ones, by returning the buffer with the last; False if the driver has not filled it yet."""
        held, self._held = self._held, None
        if held is None or self._stats_queue is None or not self._stats_queue.is_current(held):
            return False
        self._stats_queue.push(held, 0)
        return True

    def start_hinting(self) -> None:
        """Ask the guest to name its free pages; ``on_hinted`` tells that it has. One under way is begun anew."""
        self._last_cmd_id = max(CMD_ID_FIRST, (self._last_cmd_id + 1) & _WORD)
        self._hinting = False
        self.hinted_bytes = 0
        self._command(self._last_cmd_id)

    # -- what the driver does --------------------------------------------------------------------------------------

    def write_config(self, offset: int, data: bytes) -> None:
        """``actual`` is the driver's; all else is not."""
        if offset >= ACTUAL and offset + len(data) <= FREE_PAGE_HINT_CMD_ID:
            self.config[offset : offset + len(data)] = data

    def activate(self) -> None:
        """The queues get their parts."""
        there = [part for part in range(len(QUEUE_SIZES)) if part not in _NEEDED or self.has(_NEEDED[part])]
        if not all(self.queues[part].ready for part in there):
            self._parts = dict(enumerate(there))
        else:
            self._parts = {part: part for part in there}
        places = {part: place for place, part in self._parts.items()}
        self._stats_queue = self.queues[places[STATS]] if STATS in places else None

    def reset(self) -> None:
        """Forget the driver. A balloon without one is empty."""
        self._parts = {}
        self._stats_queue = self._held = None
        self._releases = {}
        self._statistics = {}
        self._hinting = False
        self._set_word(ACTUAL, 0)
        self._set_word(FREE_PAGE_HINT_CMD_ID, CMD_ID_STOP)

    def process(self, index: int) -> bool:
        """A bounded number of requests. Raises GuestFault."""
        part = self._parts.get(index)
        if part == DEFLATE:
            return self._deflate(self.queues[index])
        if part == STATS:
            return self._take_statistics(self.queues[index])
        return part is not None and self._release(part, self.queues[index])

    def _deflate(self, queue: Queue) -> bool:
        for chain in _chains(queue):
            queue.push(chain, 0)
            self.metrics.deflate_count += 1
        return queue.available() > 0

    def _take_statistics(self, queue: Queue) -> bool:
        for chain in _chains(queue):
            if self._held is not None:
                queue.push(self._held, 0)  # one buffer is all the protocol has
            self._held = chain
            try:
                if chain.readable_size > MOST_BYTES:
                    raise ValueError
                self._statistics.update(parse_statistics(chain.read()))
                self.metrics.stats_updates_count += 1
            except ValueError:
                self.metrics.stats_update_fails += 1
            self.on_stats()
        return queue.available() > 0

    # -- giving pages back -----------------------------------------------------------------------------------------

    def _release(self, part: int, queue: Queue) -> bool:
        size_left, count_left = MOST_RELEASED, MOST_RANGES
        for _ in queue.turn(MOST_CHAINS):
            release = self._current(part, queue)
            if release is None:
                return False
            now, release.rest = cut(release.rest, size_left, count_left)
            if now:
                self._give_back(release, now)
            size_left, count_left = size_left - total(now), count_left - len(now)
            if release.rest:
                return True
            del self._releases[part]
            queue.push(release.chain, 0)
            self._count(part, release)
        return queue.available() > 0

    def _current(self, part: int, queue: Queue) -> _Release | None:
        """The request that was begun, if the guest still waits for it, else the next one."""
        release = self._releases.get(part)
        if release is not None and queue.is_current(release.chain):
            return release
        chain = queue.pop()
        if chain is None:
            return None
        begin = {INFLATE: self._inflate, FREE_PAGE: self._hint}.get(part, self._report)
        release = self._releases[part] = begin(chain)
        return release

    def _inflate(self, chain: Chain) -> _Release:
        if chain.readable_size > 4 * MOST_PFNS:
            return _Release(chain, [], 1)
        try:
            asked = coalesce(parse_pfns(chain.read()))
        except ValueError:
            return _Release(chain, [], 1)
        ranges = within_ram(asked, self._ram)
        return _Release(chain, ranges, int(total(ranges) != total(asked)))

    def _report(self, chain: Chain) -> _Release:
        buffers = list(zip(chain.writable_at, map(len, chain.writable), strict=True))
        return _Release(chain, whole_pages(buffers), int(not buffers))

    def _hint(self, chain: Chain) -> _Release:
        if chain.readable_size:
            self._take_command(int.from_bytes(chain.read(4), "little"), chain.readable_size)
        if not chain.writable:
            return _Release(chain, [], 0)
        if not self._hinting:
            return _Release(chain, [], 1)
        return self._report(chain)

    def _take_command(self, cmd_id: int, size: int) -> None:
        """The driver begins to answer a command, or has answered it."""
        if size < 4:
            self.metrics.free_page_hint_fails += 1
        elif cmd_id >= CMD_ID_FIRST:
            self._hinting = cmd_id == self._word(FREE_PAGE_HINT_CMD_ID)
        elif cmd_id == CMD_ID_STOP and self._hinting:
            self._hinting = False
            self._command(CMD_ID_DONE)
            self.on_hinted()

    def _give_back(self, release: _Release, ranges: list[Range]) -> None:
        freed = self._backend.release(ranges)
        release.freed += freed
        release.failed += freed != total(ranges)

    def _count(self, part: int, release: _Release) -> None:
        metrics = self.metrics
        if part == INFLATE:
            metrics.inflate_count += 1
            metrics.event_fails += release.failed
        elif part == REPORTING:
            metrics.free_page_report_count += 1
            metrics.free_page_report_freed += release.freed
            metrics.free_page_report_fails += release.failed
        elif release.chain.writable:
            metrics.free_page_hint_count += 1
            metrics.free_page_hint_freed += release.freed
            metrics.free_page_hint_fails += release.failed
            self.hinted_bytes += release.freed

    # -- configuration space, and snapshots ------------------------------------------------------------------------

    def _command(self, cmd_id: int) -> None:
        self._set_word(FREE_PAGE_HINT_CMD_ID, cmd_id)
        self.config_changed()

    def _word(self, offset: int) -> int:
        return int.from_bytes(self.config[offset : offset + 4], "little")

    def _set_word(self, offset: int, value: int) -> None:
        self.config[offset : offset + 4] = value.to_bytes(4, "little")

    def state(self) -> dict[str, Any]:
        """What is neither configuration space nor queue. Requests under way are in the queues, to be taken again."""
        return {"hinting": self._hinting, "last_cmd_id": self._last_cmd_id, "statistics": dict(self._statistics)}

    def restore_config(self, config: bytes) -> None:
        """Any sizes: the driver may say of its own what it likes, and what was asked of it is asked again."""
        self.config[:] = config

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError."""
        self._hinting = boolean(state, "hinting")
        self._last_cmd_id = integer(state, "last_cmd_id", _WORD)
        statistics = entry(state, "statistics")
        if not isinstance(statistics, Mapping) or not set(statistics) <= set(STATISTICS):
            raise ConfigError("saved statistics", expected="a mapping of their names", found=shown(statistics))
        self._statistics = {name: integer(statistics, name, (1 << 64) - 1) for name in statistics}
        self.activate()


def _features(config: BalloonConfig) -> int:
    return (
        1 << VIRTIO_BALLOON_F_STATS_VQ
        | config.deflate_on_oom << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        | config.free_page_hinting << VIRTIO_BALLOON_F_FREE_PAGE_HINT
        | config.free_page_reporting << VIRTIO_BALLOON_F_PAGE_REPORTING
    )


def _chains(queue: Queue) -> Iterator[Chain]:
    """The next chains, MOST_CHAINS at the most."""
    for _ in queue.turn(MOST_CHAINS):
        chain = queue.pop()
        if chain is None:
            return
        yield chain


def _nothing() -> None:
    pass
