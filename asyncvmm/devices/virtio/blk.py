"""virtio-blk: the block device (virtio 1.2, section 5.2).

One queue. What is wrong with a request is answered at once, and so is a read that takes no waiting; everything else
goes to the backend in batches, in the order of the queue, and comes back by ``complete``. A bounded number of requests
and bytes is with the backend at any moment, those of a driver that was reset meanwhile included; the others wait here.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from asyncvmm.devices.checks import boolean, integer
from asyncvmm.devices.virtio.block_io import BlockBackend, BlockRequest, Operation
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import BLOCK
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import BlockMetrics

VIRTIO_BLK_F_SIZE_MAX: Final = 1
VIRTIO_BLK_F_SEG_MAX: Final = 2
VIRTIO_BLK_F_RO: Final = 5
VIRTIO_BLK_F_BLK_SIZE: Final = 6
VIRTIO_BLK_F_FLUSH: Final = 9
VIRTIO_BLK_F_TOPOLOGY: Final = 10
VIRTIO_BLK_F_CONFIG_WCE: Final = 11
VIRTIO_BLK_F_DISCARD: Final = 13
VIRTIO_BLK_F_WRITE_ZEROES: Final = 14

VIRTIO_BLK_T_IN: Final = 0
VIRTIO_BLK_T_OUT: Final = 1
VIRTIO_BLK_T_FLUSH: Final = 4
VIRTIO_BLK_T_GET_ID: Final = 8
VIRTIO_BLK_T_DISCARD: Final = 11
VIRTIO_BLK_T_WRITE_ZEROES: Final = 13

VIRTIO_BLK_S_OK: Final = 0
VIRTIO_BLK_S_IOERR: Final = 1
VIRTIO_BLK_S_UNSUPP: Final = 2

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP: Final = 1

SECTOR: Final = 512
ID_BYTES: Final = 20
QUEUE_SIZE: Final = 256
SEG_MAX: Final = QUEUE_SIZE - 2
"""Segments beside header and status: as many as the queue has room for without indirect descriptors."""

SIZE_MAX: Final = 1 << 16
MOST_REQUEST_BYTES: Final = SEG_MAX * SIZE_MAX
"""What the two allow one request to carry: 15.9 MiB. A larger one is refused."""

MOST_DISCARD_SECTORS: Final = 1 << 21
MOST_DISCARD_SEGMENTS: Final = 16
MOST_ZERO_SECTORS: Final = 1 << 17
"""64 MiB: a disk that cannot do it by itself has them written."""

MOST_REQUESTS_OUT: Final = QUEUE_SIZE
MOST_BYTES_OUT: Final = 32 << 20

_BATCH_CHAINS: Final = 64
_BATCH_BUFFERS: Final = 1024
_BATCH_BYTES: Final = 1 << 20
"""Buffers one ``process`` looks at, and bytes it reads at once: 1 MiB may be 256 pages that the guest never touched."""

_READ: Final = Operation.READ
_WRITE: Final = Operation.WRITE
_HEADER = struct.Struct("<IIQ")
_SEGMENT = struct.Struct("<QII")
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3xIII")
_WRITEBACK_AT: Final = 32
_PHYSICAL_BLOCK_EXP: Final = 3
"""Sectors of a physical block as a power of two: 4 KiB is what the host's file systems and overlays work with."""

_FEATURES: Final = (
    1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
)


class VirtioBlk(VirtioDevice):
    """A disk of ``size`` bytes, a multiple of SECTOR. serial: what GET_ID tells, cut to 20 bytes. discard: whether
    discarding is offered. clock: nanoseconds, for the latencies.

    ``backend`` is set before the driver comes; without one every request fails.
    """

    device_id: ClassVar[int] = BLOCK

    def __init__(
        self,
        size: int,
        metrics: BlockMetrics,
        *,
        serial: str = "",
        read_only: bool = False,
        discard: bool = True,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        features = _FEATURES
        if read_only:
            features |= 1 << VIRTIO_BLK_F_RO
        else:
            features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES | (discard << VIRTIO_BLK_F_DISCARD)
        super().__init__((QUEUE_SIZE,), features, _config_space(size, discard=discard), metrics)
        self.size = size
        self.read_only = read_only
        self.backend: BlockBackend | None = None
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._clock = clock
        self._waiting: deque[BlockRequest] = deque()
        self._requests_out = self._bytes_out = 0
        self._unfinished = False
        self._buffers_seen = self._bytes_read = self._taken_ns = 0
        self._sync = False
        self._takers: dict[int, Callable[[Chain, int], int | None]] = {
            VIRTIO_BLK_T_IN: self._take_read,
            VIRTIO_BLK_T_OUT: self._take_write,
            VIRTIO_BLK_T_FLUSH: self._take_flush,
            VIRTIO_BLK_T_GET_ID: self._take_get_id,
            VIRTIO_BLK_T_DISCARD: self._take_discard,
            VIRTIO_BLK_T_WRITE_ZEROES: self._take_write_zeroes,
        }

    # -- what the driver asks for ----------------------------------------------------------------------------------

    def process(self, index: int) -> bool:
        """Take a bounded number of requests. Raises GuestFault."""
        queue, metrics = self.queues[index], self.metrics
        metrics.queue_event_count += not self._unfinished
        found = self._unfinished
        self._buffers_seen, self._bytes_read, self._unfinished = 0, 0, False
        self._taken_ns, self._sync = self._clock(), self.writes_through
        try:
            for _ in range(_BATCH_CHAINS):
                chain = queue.pop()
                if chain is None:
                    break
                found = True
                self._take(chain)
                if self._buffers_seen > _BATCH_BUFFERS or self._bytes_read >= _BATCH_BYTES:
                    break
            self._unfinished = queue.available() > 0
        finally:
            self._submit()
        metrics.no_avail_buffer += not found
        metrics.remaining_reqs_count += self._unfinished
        return self._unfinished

    def _take(self, chain: Chain) -> None:
        self._buffers_seen += len(chain.readable) + len(chain.writable)
        if chain.readable_size < _HEADER.size or not chain.writable_size:
            self.metrics.invalid_reqs_count += 1  # nothing to be known, or nowhere to say so
            self.queues[0].push(chain, 0)
            return
        first = chain.readable[0]
        kind, _, sector = _HEADER.unpack_from(first if len(first) >= _HEADER.size else chain.read(_HEADER.size))
        taker = self._takers.get(kind)
        status = VIRTIO_BLK_S_UNSUPP if taker is None else taker(chain, sector)
        if status is not None:
            self.metrics.invalid_reqs_count += status != VIRTIO_BLK_S_OK
            self._answer(chain, status)

    def _take_read(self, chain: Chain, sector: int) -> int | None:
        size = chain.writable_size - 1
        if chain.readable_size != _HEADER.size or not self._holds(sector, size):
            return VIRTIO_BLK_S_IOERR
        began_ns, offset = self._clock(), sector * SECTOR
        if self._read_now(chain, offset, size):
            self._count_read(size, self._clock() - began_ns)
            return VIRTIO_BLK_S_OK
        return self._wait(BlockRequest(chain, Operation.READ, offset=offset, size=size, began_ns=began_ns))

    def _read_now(self, chain: Chain, offset: int, size: int) -> bool:
        if self.backend is None or self._bytes_read + size > _BATCH_BYTES:
            return False
        data = self.backend.read_now(offset, size)
        if data is None:
            return False
        self._bytes_read += size
        chain.write(data)
        return True

    def _take_write(self, chain: Chain, sector: int) -> int | None:
        size, views = chain.readable_size - _HEADER.size, chain.readable
        if self.read_only or chain.writable_size != 1 or not self._holds(sector, size):
            return VIRTIO_BLK_S_IOERR
        # The header by itself is how Linux makes them.
        views = views[1:] if len(views[0]) == _HEADER.size else _behind_header(views)
        if self.backend is None:
            return VIRTIO_BLK_S_IOERR
        self._waiting.append(BlockRequest(chain, _WRITE, sector * SECTOR, size, views, (), self._sync, self._taken_ns))
        return None

    def _holds(self, sector: int, size: int) -> bool:
        """Whether the disk has these bytes, in whole sectors, and not too many of them."""
        return size % SECTOR == 0 and size <= MOST_REQUEST_BYTES and sector * SECTOR + size <= self.size

    def _take_flush(self, chain: Chain, sector: int) -> int | None:
        return self._wait(BlockRequest(chain, Operation.FLUSH))

    def _take_get_id(self, chain: Chain, sector: int) -> int:
        if chain.writable_size - 1 < ID_BYTES:
            return VIRTIO_BLK_S_IOERR
        chain.write(self._serial)
        return VIRTIO_BLK_S_OK

    def _take_discard(self, chain: Chain, sector: int) -> int | None:
        if not self.has(VIRTIO_BLK_F_DISCARD):
            return VIRTIO_BLK_S_UNSUPP
        return self._take_ranges(chain, Operation.DISCARD, MOST_DISCARD_SEGMENTS, MOST_DISCARD_SECTORS)

    def _take_write_zeroes(self, chain: Chain, sector: int) -> int | None:
        if not self.has(VIRTIO_BLK_F_WRITE_ZEROES):
            return VIRTIO_BLK_S_UNSUPP
        return self._take_ranges(chain, Operation.ZERO, 1, MOST_ZERO_SECTORS)

    def _take_ranges(self, chain: Chain, operation: Operation, most: int, most_sectors: int) -> int | None:
        """Section 5.2.6.2: every range is checked before anything is done to one of them."""
        size = chain.readable_size - _HEADER.size
        if size % _SEGMENT.size or not 0 < size <= most * _SEGMENT.size or chain.writable_size != 1:
            return VIRTIO_BLK_S_IOERR
        known = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if operation is Operation.ZERO else 0
        ranges = []
        for sector, count, flags in _SEGMENT.iter_unpack(chain.read(size, _HEADER.size)):
            if flags & ~known:
                return VIRTIO_BLK_S_UNSUPP
            if count > most_sectors or (sector + count) * SECTOR > self.size:
                return VIRTIO_BLK_S_IOERR
            ranges.append((sector * SECTOR, count * SECTOR, bool(flags)))
        return self._wait(BlockRequest(chain, operation, ranges=ranges, sync=self._sync))

    # -- to the backend and back -----------------------------------------------------------------------------------

    def _wait(self, request: BlockRequest) -> int | None:
        if self.backend is None:
            return VIRTIO_BLK_S_IOERR
        self._waiting.append(request)
        return None

    def _submit(self) -> None:
        """Hand over what there is room for; one request always has it."""
        waiting, batch, generation = self._waiting, [], self.queues[0].generation
        requests_out, bytes_out = self._requests_out, self._bytes_out
        while waiting:
            request = waiting[0]
            if request.chain.generation != generation:
                waiting.popleft()
                continue
            bytes_then = bytes_out + request.size
            if requests_out and (requests_out >= MOST_REQUESTS_OUT or bytes_then > MOST_BYTES_OUT):
                self.metrics.io_engine_throttled_events += 1
                break
            requests_out, bytes_out = requests_out + 1, bytes_then
            batch.append(waiting.popleft())
        self._requests_out, self._bytes_out = requests_out, bytes_out
        if batch and self.backend is not None:
            self.backend.submit(batch)

    def complete(self, requests: Sequence[BlockRequest], *, alive: bool) -> None:
        """These came back from the backend. alive: what ``session`` gave; without a driver they are only let go."""
        generation, now_ns = self.queues[0].generation, self._clock()
        for request in requests:
            self._requests_out -= 1
            self._bytes_out -= request.size
            if alive and request.chain.generation == generation:
                self._finish(request, now_ns)
        if not alive:
            self._waiting.clear()
        self._submit()

    def _finish(self, request: BlockRequest, now_ns: int) -> None:
        chain = request.chain
        if request.failed is not None:
            self.metrics.execute_fails += 1
            self._answer(chain, VIRTIO_BLK_S_IOERR)
            return
        if request.operation is _READ:
            chain.write(memoryview(request.result))  # slices of which are no copies
            self._count_read(request.size, now_ns - request.began_ns)
        elif request.operation is _WRITE:
            metrics = self.metrics
            metrics.write_count += 1
            metrics.write_bytes += request.size
            metrics.write_agg.record((now_ns - request.began_ns) // 1000)
        elif request.operation is Operation.FLUSH:
            self.metrics.flush_count += 1
        chain.writable[-1][-1] = VIRTIO_BLK_S_OK  # as _answer does
        self.queues[0].push(chain, chain.writable_size)

    def _count_read(self, size: int, took_ns: int) -> None:
        self.metrics.read_count += 1
        self.metrics.read_bytes += size
        self.metrics.read_agg.record(took_ns // 1000)

    def _answer(self, chain: Chain, status: int) -> None:
        """The status is the last byte there is. The length covers it, and whatever lies before it."""
        chain.writable[-1][-1] = status
        self.queues[0].push(chain, chain.writable_size)

    # -- cache mode (5.2.5.2, 5.2.6.2) -----------------------------------------------------------------------------

    @property
    def writes_through(self) -> bool:
        """Whether a write must be on stable storage when it is answered: the driver will not flush."""
        if self.has(VIRTIO_BLK_F_CONFIG_WCE):
            return not self.config[_WRITEBACK_AT]
        return not self.has(VIRTIO_BLK_F_FLUSH)

    def write_config(self, offset: int, data: bytes) -> None:
        """``writeback`` is the one field a driver may write."""
        if offset != _WRITEBACK_AT or data not in (b"\0", b"\1") or not self.has(VIRTIO_BLK_F_CONFIG_WCE):
            super().write_config(offset, data)
            return
        self._set_writeback(data[0])

    def _set_writeback(self, value: int) -> None:
        if self.config[_WRITEBACK_AT] != value:
            self.config[_WRITEBACK_AT] = value
            self.config_changed()

    # -- the end of a driver, snapshots ----------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the driver. What has begun ends in the background, seen by nobody."""
        self._waiting.clear()
        self._unfinished = False
        self._set_writeback(1)
        if self.backend is not None:
            self.backend.abandon()

    def drain(self) -> bool:
        """Whether no request is under way, not even one of a driver that is gone."""
        return not self._requests_out and not self._waiting

    def state(self) -> dict[str, Any]:
        """See VirtioDevice."""
        return {"size": self.size, "read_only": self.read_only, "writeback": bool(self.config[_WRITEBACK_AT])}

    def restore_config(self, config: bytes) -> None:
        """See VirtioDevice. The driver may have changed ``writeback`` alone."""
        self.config[_WRITEBACK_AT] = config[_WRITEBACK_AT] & 1
        super().restore_config(config)

    def restore(self, state: Mapping[str, Any]) -> None:
        """See VirtioDevice. The disk must be the one that was there: as large, and as writable."""
        found = (integer(state, "size", (1 << 64) - 1), boolean(state, "read_only"))
        writeback = boolean(state, "writeback")
        if found != (self.size, self.read_only):
            raise ConfigError("saved disk", expected=(self.size, self.read_only), found=found)
        self._set_writeback(writeback)


def _config_space(size: int, *, discard: bool) -> bytes:
    """struct virtio_blk_config (5.2.4)."""
    geometry, topology = (0, 0, 0), (_PHYSICAL_BLOCK_EXP, 0, 1, 0)
    discards = (MOST_DISCARD_SECTORS, MOST_DISCARD_SEGMENTS, 1 << _PHYSICAL_BLOCK_EXP) if discard else (0, 0, 0)
    zeroes, erases = (MOST_ZERO_SECTORS, 1, int(discard)), (0, 0, 0)
    writeback, unused, queues = 1, 0, 1
    return _CONFIG.pack(
        *(size // SECTOR, SIZE_MAX, SEG_MAX, *geometry, SECTOR, *topology),
        *(writeback, unused, queues, *discards, *zeroes, *erases),
    )


def _behind_header(readable: list[memoryview]) -> list[memoryview]:
    """The data of a request: the header may lie across several buffers, or be the beginning of one."""
    skip = _HEADER.size
    for index, view in enumerate(readable):
        if skip < len(view):
            return [view[skip:], *readable[index + 1 :]] if skip else readable[index:]
        skip -= len(view)
    return []
