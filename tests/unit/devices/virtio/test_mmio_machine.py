"""The transport against a model of it: any register writes in any order, with a device that works in between."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    CONFIG_GENERATION,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    QUEUE_DESC_LOW,
    QUEUE_DEVICE_LOW,
    QUEUE_DRIVER_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_READY,
    QUEUE_SEL,
    STATUS,
)
from asyncvmm.testing import Driver

RAM = 1 << 16
QUEUES, SIZE = 2, 16
REGISTERS = (
    *(DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY, INTERRUPT_ACK, STATUS),
    *(QUEUE_DESC_LOW, QUEUE_DRIVER_LOW, QUEUE_DEVICE_LOW, CONFIG, CONFIG_GENERATION, 0x14, 0x0, 0x74, 0xFFC),
)
WORDS = st.one_of(st.integers(0, 16), st.integers(0, 0xFFFFFFFF), st.sampled_from([64, 128, 0xF, 0xB, 0x100]))


class Keeper(VirtioDevice):
    """Keeps every chain until it is told to give it back."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__((SIZE,) * QUEUES, 0, bytes(8), object())
        self.kept: list[tuple[int, Chain]] = []
        self.active = False

    def activate(self) -> None:
        assert not self.active
        self.active = True

    def reset(self) -> None:
        self.active = False

    def process(self, index: int) -> bool:
        assert self.active
        assert self.has(VIRTIO_F_VERSION_1)
        chain = self.queues[index].pop()
        if chain is None:
            return False
        self.kept.append((index, chain))
        return True


class TransportMachine(RuleBasedStateMachine):
    """Whatever a driver writes: a status bit is never lost but by a reset, and after one no memory changes."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Keeper()
        self.driver = Driver(self.device, memory_size=RAM, queue_size=8, start=False)
        self.status = 0
        self.untouchable: bytes | None = None

    @rule(register=st.sampled_from(REGISTERS), value=WORDS, size=st.sampled_from([4, 4, 4, 4, 1, 2, 8]))
    def write_any_register(self, register: int, value: int, size: int) -> None:
        self._note_reset(register, value, size)
        self.driver.write(register, value & (1 << 8 * size) - 1, size)
        self.driver.kicks.clear()

    @rule(event_idx=st.booleans())
    def start_properly(self, event_idx: bool) -> None:
        self.driver.reset()
        self.driver = self._driver_again(event_idx)
        self.driver.start()
        self.untouchable = None
        self.status = self.driver.status

    def _driver_again(self, event_idx: bool) -> Driver:
        self.device = Keeper()
        return Driver(self.device, memory_size=RAM, queue_size=8, event_idx=event_idx, start=False)

    @precondition(lambda self: self.driver.queues and self.driver.transport.running)
    @rule(index=st.integers(0, QUEUES - 1), size=st.integers(1, 64))
    def offer_a_chain(self, index: int, size: int) -> None:
        if self.device.queues[index].ready and len(self.driver.queue(index)._free):
            self.driver.send(index, [], [size])
            self.driver.kicks.append(index)
            self.driver.work()

    @precondition(lambda self: self.device.kept)
    @rule(place=st.integers(0, 1000))
    def give_a_chain_back(self, place: int) -> None:
        index, chain = self.device.kept.pop(place % len(self.device.kept))
        with self.device.session():
            if self.device.queues[index].is_current(chain):
                self.device.queues[index].push(chain, chain.write(b"\xaa" * chain.writable_size))

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        self.status = 0
        self.untouchable = bytes(self.driver.memory)

    @rule()
    def save_and_restore(self) -> None:
        state = self.driver.transport.state()
        transport = self.driver.new_transport(Keeper())
        transport.restore(state)
        assert transport.state() == state

    @invariant()
    def the_status_only_grows(self) -> None:
        status = self.driver.status
        assert status & self.status == self.status
        assert not status & STATUS_DRIVER_OK or status & STATUS_FEATURES_OK
        self.status = status

    @invariant()
    def the_device_runs_as_the_status_says(self) -> None:
        stopped = STATUS_DEVICE_NEEDS_RESET | STATUS_FAILED
        running = self.status & (STATUS_DRIVER_OK | stopped) == STATUS_DRIVER_OK
        assert self.driver.transport.running == running
        assert self.device.active or not running

    @invariant()
    def after_a_reset_memory_stays_as_it_is(self) -> None:
        if self.untouchable is not None and not any(queue.ready for queue in self.device.queues):
            assert bytes(self.driver.memory) == self.untouchable

    @invariant()
    def what_never_changes_is_there(self) -> None:
        assert self.driver.read(0) == 0x74726976
        assert self.driver.read(INTERRUPT_STATUS) < 4

    def _note_reset(self, register: int, value: int, size: int) -> None:
        if register == STATUS and size == 4 and value == 0:
            self.status = 0
            self.untouchable = bytes(self.driver.memory)
        elif register == QUEUE_READY:
            self.untouchable = None


TransportMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTransport = TransportMachine.TestCase
