"""A block device under any sequence of requests, completions, resets and nonsense, against a bytearray."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncvmm.devices.virtio.blk import MOST_BYTES_OUT, MOST_REQUESTS_OUT, VirtioBlk
from asyncvmm.devices.virtio.block_io import BlockRequest, Operation
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.storage.raw import RawImage
from asyncvmm.storage.work import merged, work_on
from asyncvmm.testing import Driver

IN, OUT, FLUSH, ZERO = 0, 1, 4, 13
SECTORS = 32
BYTES = SECTORS * 512
MOST_OFFERED = 14


class Backend:
    """Works on a real file when it is told to, and not on what was abandoned."""

    def __init__(self, image: RawImage) -> None:
        self.image = image
        self.epoch = 0
        self.held: list[tuple[int, BlockRequest]] = []
        self.at_once = False

    def submit(self, requests: Sequence[BlockRequest]) -> None:
        self.held += [(self.epoch, request) for request in requests]

    def read_now(self, offset: int, size: int) -> memoryview | None:
        room = memoryview(bytearray(size))
        return room if self.at_once and self.image.read_now(offset, [room]) else None

    def abandon(self) -> None:
        self.epoch += 1

    def take(self, count: int) -> tuple[list[BlockRequest], list[BlockRequest]]:
        """The next requests, all of them and those that still count; the latter are carried out."""
        taken, self.held = self.held[:count], self.held[count:]
        valid = [request for epoch, request in taken if epoch == self.epoch]
        for group in merged(valid):
            work_on(self.image, group)
        return [request for _, request in taken], valid


class BlockMachine(RuleBasedStateMachine):
    """The rules."""

    @initialize(event_idx=st.booleans(), indirect=st.booleans())
    def begin(self, event_idx: bool, indirect: bool) -> None:
        fd, name = tempfile.mkstemp()
        os.unlink(name)
        self.model = bytearray(os.urandom(BYTES))
        os.pwrite(fd, self.model, 0)
        self.image = RawImage(fd, BYTES)
        self.device = VirtioBlk(BYTES, BlockMetrics())
        self.backend = self.device.backend = Backend(self.image)
        self.indirect = indirect
        self.driver = Driver(self.device, memory_size=2 << 20, event_idx=event_idx, indirect=indirect)
        self.data: dict[int, tuple[int, bytes]] = {}
        self.expected: dict[int, bytes] = {}

    def offer(self, kind: int, sector: int, data: Sequence[bytes], room: Sequence[int]) -> int:
        if len(self.data) + len(self.expected) >= MOST_OFFERED:
            self.finish(1000)
        head = self.driver.send(0, [struct.pack("<IIQ", kind, 0, sector), *data], [*room, 1], indirect=self.indirect)
        self.expected[head] = b"\0"
        return head

    @rule(sector=st.integers(0, SECTORS + 1), count=st.integers(0, 6), value=st.binary(min_size=1, max_size=1))
    def write(self, sector: int, count: int, value: bytes) -> None:
        content = value * (512 * count)
        head = self.offer(OUT, sector, [content[:700], content[700:]] if count > 1 else [content] * bool(count), [])
        if sector + count > SECTORS:
            self.expected[head] = b"\1"
        else:
            self.data[head] = (sector * 512, content)
        self.kick()

    @rule(sector=st.integers(0, SECTORS - 1), count=st.integers(1, 6))
    def zero(self, sector: int, count: int) -> None:
        head = self.offer(ZERO, 0, [struct.pack("<QII", sector, count, 1)], [])
        if sector + count > SECTORS:
            self.expected[head] = b"\1"
        else:
            self.data[head] = (sector * 512, bytes(512 * count))
        self.kick()

    @rule(sector=st.integers(0, SECTORS + 1), count=st.integers(1, 6), at_once=st.booleans())
    def read(self, sector: int, count: int, at_once: bool) -> None:
        self.backend.at_once = at_once
        head = self.offer(IN, sector, [], [512 * count - 100, 100])
        if sector + count > SECTORS:
            self.expected[head] = bytes(512 * count) + b"\1"
        else:  # as it is now, unless it has to wait: then ``finish`` knows better
            self.expected[head] = bytes(self.model[sector * 512 : (sector + count) * 512]) + b"\0"
        self.kick()

    @rule()
    def flush(self) -> None:
        self.offer(FLUSH, 0, [], [])
        self.kick()

    def kick(self) -> None:
        self.driver.kick(0)
        self.collect()

    @rule(count=st.integers(1, 20))
    def finish(self, count: int) -> None:
        taken, valid = self.backend.take(count)
        for request in valid:
            assert request.failed is None
            head = request.chain.head
            if request.operation is Operation.READ:
                self.expected[head] = bytes(self.model[request.offset : request.offset + request.size]) + b"\0"
            elif request.operation is not Operation.FLUSH:
                offset, content = self.data.pop(head)
                self.model[offset : offset + len(content)] = content
        with self.device.session() as alive:
            self.device.complete(taken, alive=alive)
        self.collect()

    def collect(self) -> None:
        """What came back is what was to come back, once."""
        for used in self.driver.used(0):
            assert used.data == self.expected.pop(used.head)

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        self.driver.start()
        self.data.clear()
        self.expected.clear()

    @rule()
    def save_and_restore(self) -> None:
        self.finish(1000)
        assert self.device.drain()
        other = VirtioBlk(BYTES, BlockMetrics())
        other.restore(self.device.state())
        assert other.config == self.device.config

    @rule(
        entries=st.lists(
            st.tuples(st.integers(0, 63), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 7))
            | st.tuples(st.integers(0, 3), st.integers(0, 4096), st.integers(0, 1024), st.integers(0, 7)),
            max_size=6,
        ),
        head=st.integers(0, 2**16 - 1) | st.integers(0, 3),
        jump=st.integers(0, 2**16 - 1) | st.just(1),
    )
    def nonsense(self, entries: list[tuple[int, int, int, int]], head: int, jump: int) -> None:
        """Whatever the rings say, nothing is raised, and a reset makes it good."""
        queue = self.driver.queue(0)
        for index, address, length, flags in entries:
            queue.set_descriptor(index, address, length, flags, index + 1)
        queue.set_avail(queue.avail_index % queue.size, head)
        queue.set_avail_index(queue.avail_index + jump)
        self.driver.kick(0)
        while self.backend.held:
            taken, _ = self.backend.take(1000)
            with self.device.session() as alive:
                self.device.complete(taken, alive=alive)
        assert self.device.drain()
        self.reset()
        self.model[:] = self.image.read(0, BYTES)

    @invariant()
    def the_backend_is_bounded(self) -> None:
        if hasattr(self, "backend"):
            assert len(self.backend.held) <= MOST_REQUESTS_OUT
            assert sum(request.size for _, request in self.backend.held) <= MOST_BYTES_OUT
            assert not self.driver.needs_reset

    def teardown(self) -> None:
        if not hasattr(self, "backend"):
            return
        self.finish(1000)
        assert self.expected == {}
        assert self.image.read(0, BYTES) == self.model
        self.image.close()


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
