"""The entropy device (virtio 1.2, section 5.4): one queue of buffers, which it fills with random bytes.

A token bucket limits what the guest can take. A request that it has to wait for stays in the queue; a timer looks
again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from asyncvmm.device_config import RngConfig
from asyncvmm.devices.checks import integer
from asyncvmm.devices.token_bucket import TokenBucket
from asyncvmm.devices.virtio import ids
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.metrics.groups import EntropyMetrics

QUEUE_SIZES: Final = (256,)

MOST_CHAINS: Final = 16
"""Requests handled in one go, if they are not of many parts."""

MOST_BYTES: Final = 1 << 16
"""Bytes given for one request; the driver asks again for more."""

_NS: Final = 1e-9
_MOST_TOKENS: Final = 1 << 40

Later = Callable[[float, Callable[[], None]], object]
"""Calls something in so many seconds, on the loop: an event loop's ``call_later``."""


class VirtioRng(VirtioDevice):
    """One entropy device."""

    device_id: ClassVar[int] = ids.ENTROPY
    metrics: EntropyMetrics

    def __init__(
        self,
        config: RngConfig,
        source: Callable[[int], bytes],
        metrics: EntropyMetrics,
        *,
        clock_ns: Callable[[], int],
        later: Later,
    ) -> None:
        """``source`` gives so many random bytes, or at least one; it may raise OSError."""
        super().__init__(QUEUE_SIZES, 0, b"", metrics)
        self._source = source
        self._later = later
        self._bucket: TokenBucket | None = None
        if config.bytes_per_s:
            self._bucket = TokenBucket(config.bytes_per_s, config.burst_bytes or config.bytes_per_s, clock_ns)
        self._throttled = self._waiting = False

    def process(self, index: int) -> bool:
        """A bounded number of requests, as far as the limit allows. Raises GuestFault."""
        queue = self.queues[index]
        for _ in queue.turn(MOST_CHAINS):
            chain = queue.pop()
            if chain is None:
                return False
            size = self._size(chain)
            wait_ns = self._bucket.take(size) if self._bucket else 0
            if wait_ns:
                queue.undo_pop()
                self._throttle(wait_ns)
                return False
            self._throttled = False
            queue.push(chain, self._fill(chain, size))
        return queue.available() > 0

    def _size(self, chain: Chain) -> int:
        """A request larger than the burst could never be granted whole."""
        most = min(MOST_BYTES, self._bucket.burst) if self._bucket else MOST_BYTES
        return min(chain.writable_size, most)

    def _fill(self, chain: Chain, size: int) -> int:
        self.metrics.entropy_event_count += 1
        if not size:
            self.metrics.entropy_event_fails += 1
            return 0
        try:
            data = self._source(size)
        except OSError:
            self.metrics.host_rng_fails += 1
            self.metrics.entropy_event_fails += 1
            return 0
        written = chain.write(data)
        self.metrics.entropy_bytes += written
        return written

    def _throttle(self, wait_ns: int) -> None:
        if not self._throttled:
            self._throttled = True
            self.metrics.entropy_rate_limiter_throttled += 1
        if not self._waiting:
            self._waiting = True
            self._later(wait_ns * _NS, self._look_again)

    def _look_again(self) -> None:
        """On the loop, without the lock."""
        with self.session() as running:
            self._waiting = False
            self.metrics.rate_limiter_event_count += 1
            if running and self.process(0):
                self._waiting = True
                self._later(0, self._look_again)

    def state(self) -> dict[str, Any]:
        """What the guest could take at once."""
        return {"tokens": self._bucket.tokens if self._bucket else 0}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError."""
        tokens = integer(state, "tokens", _MOST_TOKENS)
        if self._bucket:
            self._bucket.set_tokens(tokens)
