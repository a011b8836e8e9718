"""A hostile guest, and a host with its own affairs: the fuzzer's script played to a device behind its real transport.

After each action everything is looked at: no exception has come out, only offered memory was written to and all of it
is marked dirty, work was bounded, chains came back once, the driver heard of it. In the end the guest resets the
device, which must then do whatever a well-behaved driver asks for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import orjson

from asyncvmm.devices.virtio import registers
from asyncvmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from asyncvmm.errors import ConfigError
from tests.fuzz.driver import SHARE, ObservedDriver
from tests.fuzz.memory import HIGH
from tests.fuzz.mutation import mutate
from tests.fuzz.script import Script
from tests.fuzz.target import Target
from tests.fuzz.watch import Watch

MOST_ACTIONS = 100
REGISTERS = tuple(range(0, 0x100, 4))
SIZES = (1, 2, 4, 8, 16)
_MOST_ADDRESS = (1 << 64) - 1
_DESCRIPTOR = struct.Struct("<QIHH")
_STATUSES = (1, 3, 0xB, 0xF, 0xF, 0xB, 4, 7, 8, 0x4F, 0x8F, 0, 0x10, 0xFFFFFFFF)


class Play:
    """One run of a script."""

    def __init__(self, target: Target, data: bytes) -> None:
        self.target = target
        self.script = Script(data)
        options = self.script.byte()
        device = target.make(self.script)
        self.driver = ObservedDriver(
            device,
            memory_size=SHARE * len(device.queues),
            queue_size=SIZES[self.script.byte() % len(SIZES)],
            features=None if options & 1 else device.features & self.script.number(4),
            event_idx=bool(options & 2),
            indirect=bool(options & 4),
            start=False,
        )
        self._attach()
        self.cursor = 0
        self.start(well=True)

    def _attach(self) -> None:
        self.watch = Watch(self.driver.view, self.driver.transport)
        self.target.watch, self.target.view = self.watch, self.driver.view

    def start(self, *, well: bool) -> None:
        """Bring the device up. If it need not go well, a device may object to queues that fit each other badly."""
        self.driver.start()
        self.driver.view.sync()
        if well:
            assert self.driver.transport.running, self.driver.faults[-1:]

    def run(self) -> None:
        """The whole script, then the end."""
        for _ in range(MOST_ACTIONS):
            if self.script.ended:
                break
            self._act(self.script.pick(_ACTIONS))
        self._end()

    def _act(self, action: Callable[[Play], None]) -> None:
        self.watch.begin()
        interrupts = self.driver.interrupts
        action(self)
        self._look(interrupts)

    def _look(self, interrupts: int) -> None:
        self.watch.end()
        assert not self.watch.wants_interrupt() or self.driver.interrupts > interrupts, "the driver was not interrupted"
        self.target.check()

    def _end(self) -> None:
        self._act(Play.reset)
        memory = [bytes(region.memory) for region in self.driver.view.regions]
        self.target.settle()
        self.target.check()
        assert [bytes(region.memory) for region in self.driver.view.regions] == memory, "written to after a reset"
        assert self.driver.device.drain(), "something is under way for ever"
        self.driver._wanted |= self.driver.device.features
        self.driver._queue_size = None
        self._start_anew()
        self.driver.kicks.clear()
        self.target.serves(self.driver)
        assert not self.driver.needs_reset, self.driver.faults[-1:]

    def _start_anew(self) -> None:
        self.driver.reset()
        self.start(well=True)

    # -- the guest -------------------------------------------------------------------------------------------------

    def write_register(self) -> None:
        """Any value to any place."""
        script = self.script
        offset = script.pick(REGISTERS) if script.flag() else script.number(2) % (registers.PAGE_BYTES - 8)
        size = script.pick((4, 4, 4, 1, 2, 8))
        self.driver.write(offset, script.number(size) if script.flag() else script.byte(), size)
        self._work()

    def write_config(self) -> None:
        """Somewhere in the configuration space."""
        script = self.script
        size = script.pick((1, 2, 4, 8))
        self.driver.write(registers.CONFIG + script.byte() % 72, script.number(size), size)

    def negotiate(self) -> None:
        """Anew, with other features, and the status bits in any order."""
        script = self.script
        self.driver.write(registers.STATUS, 0)
        self._check_untouched()
        self.driver.accept(script.number(8) if script.flag() else self.driver.offered() & ~(1 << script.byte() % 40))
        for _ in range(1 + script.byte() % 4):
            self.driver.write(registers.STATUS, script.pick(_STATUSES))
        self._work()

    def set_up_queue(self) -> None:
        """Stop a queue, and start it elsewhere, or in another size."""
        script = self.script
        self.driver.write(registers.QUEUE_SEL, script.byte() % (len(self.driver.queues) + 1))
        self.driver.write(registers.QUEUE_READY, 0)
        self._check_untouched()
        self.driver.write(registers.QUEUE_NUM, script.pick((1, 2, 4, 8, 16, 3, 0, 0x8000)))
        for register in (registers.QUEUE_DESC_LOW, registers.QUEUE_DRIVER_LOW, registers.QUEUE_DEVICE_LOW):
            address = script.number(2)
            self.driver.write(register, address & ~15 if script.byte() % 8 else address)
            self.driver.write(register + 4, int(script.byte() % 8 == 0))
        self.driver.write(registers.QUEUE_READY, script.pick((1, 1, 1, 0, 2)))
        self._work()

    def read_register(self) -> None:
        """What stands anywhere."""
        self.driver.read(self.script.number(2) % (registers.PAGE_BYTES - 8), self.script.pick((1, 2, 4, 8)))

    def write_memory(self) -> None:
        """Any bytes anywhere."""
        script = self.script
        address = script.number(2) + (HIGH if script.flag() else 0)
        self.driver.view.guest_writes(address, script.data(script.byte()))

    def write_descriptor(self) -> None:
        """One entry of a descriptor table."""
        queue = self._queue()
        queue.set_descriptor(self.script.byte() % queue.size, *self._descriptor(queue.size))
        self.driver.view.sync()

    def offer_nonsense(self) -> None:
        """A chain of any descriptors, or a table of them, and a kick."""
        script, index = self.script, self._queue_index()
        queue = self.driver.queue(index)
        entries = [self._descriptor(queue.size) for _ in range(1 + script.byte() % 4)]
        head = self.cursor % queue.size
        if script.byte() % 4 == 0:
            table = b"".join(_DESCRIPTOR.pack(*entry) for entry in entries)
            size = len(table) if script.byte() % 8 else script.size()
            entries = [(self._place(index, table, size), size, DESC_F_INDIRECT | script.byte() % 8, 0)]
        for place, entry in enumerate(entries):
            queue.set_descriptor((head + place) % queue.size, *entry)
        self.cursor += len(entries)
        queue.put_available(head)
        self.driver.view.sync()
        self.driver.write(registers.QUEUE_NOTIFY, index)
        self._work()

    def _descriptor(self, count: int) -> tuple[int, int, int, int]:
        """With an address that is RAM more often than not."""
        script = self.script
        address, kind = script.number(2), script.byte() % 8
        if kind == 0:
            address = (1 << 64) - address & _MOST_ADDRESS
        elif kind == 1:
            address += HIGH
        elif kind > 3:
            address %= len(self.driver.memory)
        return address, script.size(), script.byte() % 8, script.byte() % (count + 1)

    def make_available(self) -> None:
        """A head, or an index that jumps."""
        script, queue = self.script, self._queue()
        how = script.byte() % 4
        if how == 0:
            queue.set_avail_index(script.number(2))
        elif how == 1:
            queue.set_avail_flags(script.byte())
            queue.set_used_event(script.number(2))
        else:
            queue.put_available(script.byte() % (queue.size + 1))
        self.driver.view.sync()

    def offer(self) -> None:
        """A chain that is as it should be, of what the device understands; only that its buffers are used again."""
        script, index = self.script, self._queue_index()
        readable, writable = self.target.request(script, index)
        parts = [(data, len(data), 0) for data in readable] + [(b"", size, DESC_F_WRITE) for size in writable]
        self._offer(index, parts, indirect=script.byte() % 4 == 0)

    def offer_and_kick(self) -> None:
        """The same, and the device hears of it."""
        self.offer()
        self.kick()

    def _offer(self, index: int, parts: list[tuple[bytes, int, int]], *, indirect: bool) -> None:
        queue = self.driver.queue(index)
        entries = [
            (self._place(index, data, size), size, flags | DESC_F_NEXT * (place < len(parts) - 1))
            for place, (data, size, flags) in enumerate(parts)
        ]
        head = self.cursor % queue.size
        if indirect and self.driver.queues:
            table = b"".join(
                _DESCRIPTOR.pack(address, size, flags, place) for place, (address, size, flags) in enumerate(entries, 1)
            )
            queue.set_descriptor(head, self._place(index, table, len(table)), len(table), DESC_F_INDIRECT, 0)
            self.cursor += 1
        else:
            for address, size, flags in entries:
                at = self.cursor % queue.size
                queue.set_descriptor(at, address, size, flags, (at + 1) % queue.size)
                self.cursor += 1
        queue.put_available(head)
        self.driver.view.sync()

    def _place(self, index: int, data: bytes, size: int) -> int:
        """A place for a buffer, behind the rings of its queue, where others may lie. ``data`` may be longer than it is
        said to be."""
        queue, size = self.driver.queue(index), max(size, len(data))
        first, last = queue._buffers, queue._end
        if first + size > last:
            return first
        queue._next = queue._next if queue._next + size <= last else first
        address = queue._next
        queue._next += size
        self.driver.memory[address : address + len(data)] = data
        return address

    def kick(self) -> None:
        """Through the register, or by an ioeventfd, which works whatever the status is."""
        index = self._queue_index()
        if self.script.flag():
            self.driver.kicks.append(index)
        else:
            self.driver.write(registers.QUEUE_NOTIFY, index)
        self._work()

    def strike_later(self) -> None:
        """Change memory under the eyes of the device, the next few times that it looks."""
        script = self.script
        for _ in range(script.byte() % 4):
            self.driver.view.strikes.append(
                (script.number(2) % len(self.driver.memory), script.data(script.byte() % 32))
            )
        self.watch.calm = False
        self.kick()

    def reset(self) -> None:
        """Now, whatever is under way."""
        self.driver.reset()
        self._check_untouched()

    def restart(self) -> None:
        """A new driver comes, which keeps to the rules as yet."""
        self.driver.reset()
        self._check_untouched()
        self.start(well=False)

    def _check_untouched(self) -> None:
        """A reset writes nothing, and what was offered before is the guest's own again."""
        self.watch.view.check((), ())

    def _work(self) -> None:
        for _ in range(self.target.most_turns):
            if not self.driver.kicks:
                return
            index = self.driver.kicks.pop(0)
            self.watch.pops, walked = 0, self._walked()
            if self.driver.transport.kick(index):
                self.driver.kicks.append(index)
            else:
                self._served(index)
            assert self.watch.pops <= self.target.most_pops, f"{self.watch.pops} chains taken in one go"
            walked = self._walked() - walked
            assert walked <= self.target.most_walked, f"{walked} descriptors looked at in one go"
        raise AssertionError("the device never has enough")

    def _walked(self) -> int:
        return sum(queue.walked for queue in self.driver.device.queues)

    def _served(self, index: int) -> None:
        transport, queue = self.driver.transport, self.driver.device.queues[index]
        if transport.running and self.watch.calm and not self.target.may_wait(index):
            assert not queue.ready or not queue.available(), "chains were left in the queue, and nobody looks again"
            assert not self.watch.queues[index].is_deaf(), "the driver will not kick for the next chain"

    def _queue_index(self) -> int:
        return self.script.byte() % len(self.driver.queues)

    def _queue(self) -> Any:
        return self.driver.queue(self._queue_index())

    # -- the host --------------------------------------------------------------------------------------------------

    def event(self) -> None:
        """Something happens on the host."""
        self.target.event(self.script)
        self._work()

    def save(self) -> None:
        """The device goes on in another process."""
        self._restore_from(self._saved())

    def restore_nonsense(self) -> None:
        """Somebody has changed the snapshot. If it cannot be believed, ConfigError says so."""
        state = mutate(self._saved(), self.script)
        try:
            self._restore_from(state, compare=False)
        except ConfigError:
            self._replace_device()

    def _saved(self) -> Any:
        self.target.settle()
        self._work()
        self.target.settle()
        self.watch.end()
        assert self.driver.device.drain(), "something is under way for ever"
        return orjson.loads(orjson.dumps(self.driver.transport.state()))

    def _replace_device(self) -> None:
        self.driver.transport.close()
        self.driver.device = self.target.make(Script(b""))
        self.driver.transport = self.driver.new_transport(self.driver.device)
        self.driver.kicks.clear()
        self._attach()

    def _restore_from(self, state: Any, *, compare: bool = True) -> None:
        self._replace_device()
        self.driver.transport.restore(state)
        if compare:
            again = orjson.loads(orjson.dumps(self.driver.transport.state()))
            assert self.target.comparable(again) == self.target.comparable(state), "restored to something else"


_ACTIONS = (
    Play.offer_and_kick,
    Play.event,
    Play.offer,
    Play.kick,
    Play.offer_nonsense,
    Play.offer_and_kick,
    Play.event,
    Play.write_register,
    Play.write_config,
    Play.set_up_queue,
    Play.negotiate,
    Play.write_descriptor,
    Play.make_available,
    Play.write_memory,
    Play.strike_later,
    Play.reset,
    Play.restart,
    Play.save,
    Play.restore_nonsense,
    Play.read_register,
)


def play(target: Target, data: bytes) -> None:
    """Play ``data`` as a script to ``target``. Raises AssertionError, or whatever came out of the device."""
    Play(target, data).run()
