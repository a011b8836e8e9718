"""The virtio-mmio transport: status machine, features, queues, resets and interrupts, as a driver meets them."""

from __future__ import annotations

import attrs
import pytest

from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.ids import (
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    VIRTIO_F_VERSION_1,
)
from asyncvmm.devices.virtio.memory import GuestFault
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.devices.virtio.registers import (
    CONFIG,
    CONFIG_GENERATION,
    DEVICE_ID,
    INTERRUPT_CONFIG_CHANGE,
    INTERRUPT_STATUS,
    INTERRUPT_USED_BUFFER,
    MAGIC_VALUE,
    QUEUE_DESC_LOW,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    SHM_LEN_LOW,
    STATUS,
)
from asyncvmm.errors import ConfigError
from asyncvmm.testing import Driver

UP = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK


@attrs.define
class Counters:
    activate_fails: int = 0
    cfg_fails: int = 0
    event_fails: int = 0


class Echo(VirtioDevice):
    """Writes back what it reads, upper case; holds chains back while told to."""

    device_id = 42

    def __init__(self) -> None:
        super().__init__((64, 4), 0b1010, b"\x01\x02\x03\x04", Counters())
        self.holding = False
        self.held: list[Chain] = []
        self.refuse = False

    def activate(self) -> None:
        if self.refuse:
            raise GuestFault("not today")

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        for _ in range(2):
            chain = queue.pop()
            if chain is None:
                return False
            if self.holding:
                self.held.append(chain)
            else:
                self.finish(index, chain)
        return True

    def finish(self, index: int, chain: Chain) -> None:
        if self.queues[index].is_current(chain):
            self.queues[index].push(chain, chain.write(chain.read().upper()))


def test_the_registers_say_what_the_device_is() -> None:
    driver = Driver(Echo(), start=False)
    assert driver.read(MAGIC_VALUE).to_bytes(4, "little") == b"virt"
    assert (driver.read(4), driver.read(DEVICE_ID), driver.read(SHM_LEN_LOW)) == (2, 42, 0xFFFFFFFF)
    assert driver.offered() == 0b1010 | 1 << 28 | 1 << 29 | 1 << 32
    assert driver.config(0, 4) == b"\x01\x02\x03\x04"


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_a_request_comes_back_with_its_answer_and_one_interrupt(event_idx: bool, indirect: bool) -> None:
    driver = Driver(Echo(), event_idx=event_idx, indirect=indirect)
    assert driver.request(0, [b"he", b"llo"], [3, 9], indirect=indirect) == b"HELLO"
    assert driver.interrupts == 1
    assert driver.acknowledge() == INTERRUPT_USED_BUFFER
    assert driver.acknowledge() == 0


def test_one_kick_serves_all_that_is_there() -> None:
    driver = Driver(Echo())
    heads = [driver.send(0, [bytes([65 + i])], [1]) for i in range(9)]
    driver.kick(0)
    assert [used.head for used in driver.used(0)] == heads


def test_a_ring_goes_round_many_times() -> None:
    driver = Driver(Echo(), queue_size=4, event_idx=True)
    for turn in range(70_000 // 64):
        assert driver.request(1, [b"%d" % turn], [8]) == b"%d" % turn


def test_a_driver_that_wants_no_interrupt_gets_none() -> None:
    driver = Driver(Echo())
    driver.queue(0).set_avail_flags(1)
    driver.request(0, [b"x"], [1])
    assert driver.interrupts == 0


def test_with_event_indices_an_interrupt_comes_at_the_index_that_was_asked_for() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.queue(0).set_used_event(2)
    for expected in (0, 0, 1, 1):
        driver.send(0, [b"x"], [1])
        driver.kick(0)
        assert driver.interrupts == expected


def test_the_device_says_where_it_wants_to_be_kicked_next() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.request(0, [b"x"], [1])
    assert driver.queue(0).avail_event == 1


def test_a_chain_taken_without_a_kick_moves_the_place_of_the_next_kick() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    for expected in (1, 2):
        driver.send(0, [b"x"], [1])
        with device.session():
            device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
        assert driver.queue(0).avail_event == expected


def test_a_chain_that_comes_as_the_place_is_moved_is_served_all_the_same() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    driver.send(0, [b"x"], [1])
    fence, late = driver.view.fence, [b"late"]

    def come_late() -> None:
        if late:
            driver.send(0, [late.pop()], [4])
        fence()

    driver.view.fence = come_late
    with device.session():
        device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE"]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_comes_without_a_kick_after_the_devices_last_look_is_served_all_the_same(event_idx: bool) -> None:
    device = Echo()
    driver = Driver(device, event_idx=event_idx)
    work, late = device.process, [b"late", b"later"]

    def process(index: int) -> bool:
        more = work(index)
        if not more and late:
            driver.send(0, [late.pop(0)], [8])
        return more

    device.process = process  # type: ignore[method-assign]
    driver.send(0, [b"x"], [1])
    driver.kick(0)
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE", b"LATER"]


def test_a_chain_that_comes_between_the_last_pop_and_the_end_of_a_session_is_served_all_the_same() -> None:
    device = Echo()
    driver = Driver(device, event_idx=True)
    driver.send(0, [b"x"], [1])
    with device.session():
        device.finish(0, device.queues[0].pop() or pytest.fail("no chain"))
        assert device.queues[0].pop() is None
        driver.send(0, [b"late"], [4])
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"X", b"LATE"]


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_device_that_leaves_chains_where_they_are_is_not_asked_again_and_again(event_idx: bool) -> None:
    device = Echo()
    driver = Driver(device, event_idx=event_idx)
    asked: list[int] = []
    device.process = lambda index: bool(asked.append(index))  # type: ignore[method-assign,func-returns-value]
    driver.send(0, [b"x"], [1])
    driver.kick(0)
    assert asked == [0]


def test_a_chain_that_was_there_before_driver_ok_is_served_then() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, UP & ~STATUS_DRIVER_OK)
    driver.set_up_queues()
    driver.send(1, [b"early"], [5])
    driver.write(QUEUE_NOTIFY, 1)
    assert driver.kicks == []
    driver.write(STATUS, UP)
    driver.work()
    assert [used.data for used in driver.used(1)] == [b"EARLY"]


def test_features_that_were_not_offered_are_refused() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1 | 0b0100)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    assert not driver.status & STATUS_FEATURES_OK


def test_a_driver_without_version_1_is_refused() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(0b1010)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    assert not driver.status & STATUS_FEATURES_OK


@pytest.mark.parametrize(
    ("writes", "status"),
    [
        ([STATUS_ACKNOWLEDGE, STATUS_DRIVER_OK | STATUS_ACKNOWLEDGE], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE, STATUS_DRIVER], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE | 16], 0),
        ([STATUS_ACKNOWLEDGE | 64], STATUS_ACKNOWLEDGE),
        ([STATUS_ACKNOWLEDGE, STATUS_ACKNOWLEDGE | STATUS_FAILED], STATUS_ACKNOWLEDGE | STATUS_FAILED),
        ([STATUS_ACKNOWLEDGE | STATUS_DRIVER, 0], 0),
    ],
)
def test_a_status_that_cannot_follow_is_ignored(writes: list[int], status: int) -> None:
    driver = Driver(Echo(), start=False)
    for value in writes:
        driver.write(STATUS, value)
    assert driver.status == status


def test_a_reset_gives_the_memory_back_at_once() -> None:
    device = Echo()
    driver = Driver(device)
    device.holding = True
    driver.send(0, [b"late"], [4])
    driver.kick(0)
    driver.reset()
    before = bytes(driver.memory)
    with device.session() as running:
        assert not running
        device.finish(0, device.held[0])
    assert bytes(driver.memory) == before


def test_a_queue_that_is_stopped_forgets_its_chains() -> None:
    device = Echo()
    driver = Driver(device)
    device.holding = True
    driver.send(0, [b"late"], [4])
    driver.kick(0)
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_READY, 0)
    before = bytes(driver.memory)
    with device.session():
        device.finish(0, device.held[0])
    assert bytes(driver.memory) == before
    assert driver.read(QUEUE_READY) == 0


def test_a_device_can_be_started_again_after_a_reset() -> None:
    driver = Driver(Echo())
    driver.reset()
    driver.start()
    assert driver.request(0, [b"again"], [5]) == b"AGAIN"


@pytest.mark.parametrize("size", [0, 3, 128, 1 << 31])
def test_a_queue_of_an_impossible_size_asks_for_a_reset(size: int) -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_NUM, size)
    driver.write(QUEUE_READY, 1)
    assert (driver.read(QUEUE_READY), driver.needs_reset) == (0, True)


@pytest.mark.parametrize("address", [1, 0xFFFFFFF0, (1 << 64) - 16, 1 << 20])
def test_a_queue_outside_of_memory_or_askew_asks_for_a_reset(address: int) -> None:
    driver = Driver(Echo(), start=False)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER)
    driver.accept(1 << VIRTIO_F_VERSION_1)
    driver.write(STATUS, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK)
    driver.write(QUEUE_NUM, 4)
    driver.write(QUEUE_DESC_LOW, address & 0xFFFFFFFF)
    driver.write(QUEUE_DESC_LOW + 4, address >> 32)
    driver.write(QUEUE_READY, 1)
    assert (driver.read(QUEUE_READY), driver.needs_reset) == (0, True)


def test_queues_cannot_be_set_up_before_features_are_settled_or_while_they_are_used() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_NUM, 8)
    assert driver.device.queues[0].size == 0
    driver.start()
    driver.write(QUEUE_SEL, 0)
    driver.write(QUEUE_NUM, 8)
    driver.write(QUEUE_DESC_LOW, 0x5000)
    assert (driver.device.queues[0].size, driver.device.queues[0].descriptors) == (64, 0)


def test_a_queue_that_is_not_there_has_no_size() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_SEL, 2)
    assert (driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)) == (0, 0)
    driver.write(QUEUE_SEL, 0xFFFFFFFF)
    driver.write(QUEUE_READY, 1)
    assert driver.read(QUEUE_NUM_MAX) == 0


def test_kicks_of_queues_that_are_not_there_or_too_early_are_ignored() -> None:
    driver = Driver(Echo(), start=False)
    driver.write(QUEUE_NOTIFY, 0)
    driver.start()
    driver.write(QUEUE_NOTIFY, 2)
    assert driver.kicks == []


@pytest.mark.parametrize(("offset", "size"), [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0, 4), (0x74, 4)])
def test_a_write_that_is_no_word_to_a_register_is_ignored(offset: int, size: int) -> None:
    driver = Driver(Echo())
    page = bytes(driver.read(i, 1) for i in range(0x200))
    driver.write(offset, 0, size)
    assert bytes(driver.read(i, 1) for i in range(0x200)) == page


def test_a_write_beyond_the_configuration_space_is_counted_and_ignored() -> None:
    driver = Driver(Echo())
    page = bytes(driver.read(i, 1) for i in range(0x1000))
    driver.write(0x102, 0, 4)
    driver.write(0xFF8, 0, 8)
    assert bytes(driver.read(i, 1) for i in range(0x1000)) == page
    assert driver.device.metrics.cfg_fails == 2


def test_a_changed_configuration_is_shown_and_announced() -> None:
    driver = Driver(Echo())
    before = driver.read(CONFIG_GENERATION)
    driver.device.config[:] = b"WXYZ"
    driver.device.config_changed()
    assert driver.config(0, 4) == b"WXYZ"
    assert driver.read(CONFIG_GENERATION) != before
    assert driver.read(INTERRUPT_STATUS) == INTERRUPT_CONFIG_CHANGE
    assert driver.interrupts == 1


def test_a_change_before_the_driver_is_there_interrupts_nobody() -> None:
    driver = Driver(Echo(), start=False)
    driver.device.config_changed()
    assert (driver.interrupts, driver.read(INTERRUPT_STATUS)) == (0, 0)


def test_a_device_that_refuses_to_start_asks_for_a_reset() -> None:
    device = Echo()
    device.refuse = True
    driver = Driver(device)
    assert driver.needs_reset
    assert device.metrics.activate_fails == 1


def test_after_a_fault_nothing_is_served_until_the_reset() -> None:
    driver = Driver(Echo())
    driver.queue(0).put_available(64)
    driver.kick(0)
    assert driver.needs_reset
    assert driver.read(INTERRUPT_STATUS) & INTERRUPT_CONFIG_CHANGE
    driver.send(1, [b"x"], [1])
    driver.kick(1)
    assert driver.used(1) == []
    driver.reset()
    driver.start()
    assert driver.request(1, [b"x"], [1]) == b"X"


def test_a_device_restored_from_its_state_goes_on_where_it_was() -> None:
    driver = Driver(Echo(), event_idx=True)
    for _ in range(5):
        driver.request(0, [b"before"], [6])
    state = driver.transport.state()
    device = Echo()
    transport = driver.new_transport(device)
    transport.restore(state)
    driver.transport = transport
    assert transport.state() == state
    assert driver.request(0, [b"after"], [6]) == b"AFTER"


def test_a_restored_device_serves_what_waited_for_it() -> None:
    driver = Driver(Echo(), event_idx=True)
    driver.send(0, [b"waiting"], [7])
    state = driver.transport.state()
    driver.transport = driver.new_transport(Echo())
    driver.transport.restore(state)
    driver.work()
    assert [used.data for used in driver.used(0)] == [b"WAITING"]


def test_what_a_driver_writes_to_the_configuration_it_reads_there() -> None:
    class Writable(Echo):
        def write_config(self, offset: int, data: bytes) -> None:
            self.config[offset : offset + len(data)] = data

    driver = Driver(Writable())
    driver.write(CONFIG + 1, 0xAB, 1)
    assert driver.config(0, 4) == b"\x01\xab\x03\x04"
    assert driver.interrupts == 0


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": 1},
        {"acked": 1 << 63},
        {"status": -1},
        {"queues": []},
        {"queues": None},
        {"config": "00"},
        {"config": "zz"},
        {"interrupt_status": 4},
        {"wanted": None},
        {"queue_sel": "1"},
    ],
)
def test_a_state_that_no_device_can_have_is_refused(change: dict[str, object]) -> None:
    driver = Driver(Echo())
    with pytest.raises(ConfigError):
        driver.new_transport(Echo()).restore({**driver.transport.state(), **change})


@pytest.mark.parametrize(
    ("field", "value"), [("size", 3), ("descriptors", 1 << 40), ("next_avail", 65536), ("size", 0)]
)
def test_a_saved_queue_that_cannot_be_is_refused(field: str, value: int) -> None:
    driver = Driver(Echo())
    state = driver.transport.state()
    state["queues"][0][field] = value
    with pytest.raises(ConfigError):
        driver.new_transport(Echo()).restore(state)
