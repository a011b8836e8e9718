"""Saved states as an attacker writes them: each is taken or refused with a ConfigError, whatever stands in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.device_config import BalloonConfig, ConsoleConfig, RngConfig
from asyncvmm.devices.virtio.balloon.device import VirtioBalloon
from asyncvmm.devices.virtio.blk import VirtioBlk
from asyncvmm.devices.virtio.console.device import VirtioConsole
from asyncvmm.devices.virtio.device import VirtioDevice
from asyncvmm.devices.virtio.net import VirtioNet
from asyncvmm.devices.virtio.rng import VirtioRng
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.errors import ConfigError
from asyncvmm.metrics.groups import (
    BalloonMetrics,
    BlockMetrics,
    ConsoleMetrics,
    EntropyMetrics,
    NetMetrics,
    VsockMetrics,
)
from asyncvmm.testing import Driver

RAM = 1 << 18


class Nowhere:
    """A backend that takes everything: pages, requests and frames."""

    def release(self, ranges: list[tuple[int, int]]) -> int:
        return sum(size for _, size in ranges)

    def submit(self, requests: object) -> None:
        pass

    def read_now(self, offset: int, size: int) -> memoryview | None:
        return None

    def abandon(self) -> None:
        pass

    def start(self, offloads: object) -> None:
        pass

    def receive(self) -> None:
        pass

    def room(self) -> int:
        return RAM

    def send(self, packets: object) -> None:
        pass


def blk() -> VirtioBlk:
    device = VirtioBlk(1 << 20, BlockMetrics())
    device.backend = Nowhere()
    return device


DEVICES: dict[str, Callable[[], VirtioDevice]] = {
    "balloon": lambda: VirtioBalloon(BalloonConfig(free_page_hinting=True), ((0, RAM),), Nowhere(), BalloonMetrics()),
    "blk": blk,
    "console": lambda: VirtioConsole(ConsoleConfig(ports=("data",)), ConsoleMetrics()),
    "net": lambda: VirtioNet(b"\2\0\0\0\0\1", Nowhere(), NetMetrics(), mtu=1500),
    "rng": lambda: VirtioRng(
        RngConfig(bytes_per_s=1000),
        bytes,
        EntropyMetrics(),
        clock_ns=lambda: 0,
        later=lambda seconds, call: None,
    ),
    "vsock": lambda: VirtioVsock(3, VsockMetrics()),
}

NUMBERS = st.one_of(
    st.integers(-1, 65536),
    st.integers(0, 1 << 64),
    st.sampled_from([1 << 31, 1 << 32, (1 << 32) - 1, (1 << 64) - 1, 1 << 64, 1 << 5000, -(1 << 5000)]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=20), st.binary(max_size=20))
ANYTHING = st.one_of(
    LEAVES,
    st.sampled_from(["00" * 12, "00" * 60, "zz", "\ud800", b"\0" * 60, [0] * 100_000, ["00"] * 100_000, {}, []]),
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner)),
)
REMOVED = object()


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a state at which something stands."""
    found = [path]
    if isinstance(value, Mapping):
        for name in value:
            found += places_of(value[name], (*path, name))
    elif isinstance(value, list):
        for index in range(len(value)):
            found += places_of(value[index], (*path, index))
    return found


def changed(state: Any, path: tuple[Any, ...], value: object) -> Any:
    """The state with something else there, or with nothing."""
    if not path:
        return None if value is REMOVED else value
    copied = copy.copy(state)
    if len(path) > 1 or value is not REMOVED:
        copied[path[0]] = changed(state[path[0]], path[1:], value)
    else:
        del copied[path[0]]
    return copied


def used_for_a_while(name: str) -> Driver:
    driver = Driver(DEVICES[name](), memory_size=RAM, queue_size=8, event_idx=True, indirect=True)
    for index in range(len(driver.queues)):
        driver.send(index, [bytes(32)])
        driver.send(index, [bytes(16)], [64])
        driver.kick(index)
    return driver


SAVED = {name: used_for_a_while(name).transport.state() for name in DEVICES}


@pytest.mark.parametrize("name", DEVICES)
def test_what_was_saved_is_taken(name: str) -> None:
    driver = Driver(DEVICES[name](), memory_size=RAM)
    driver.new_transport(DEVICES[name]()).restore(SAVED[name])


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_state_with_anything_anywhere_is_taken_or_refused(name: str, data: st.DataObject) -> None:
    state = SAVED[name]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places_of(state)))
        state = changed(state, path, data.draw(st.just(REMOVED) | ANYTHING))
    survives(name, state)


def survives(name: str, state: Any) -> None:
    """Restore, and if it is taken, let the device work, be saved again and be reset."""
    driver = Driver(DEVICES[name](), memory_size=RAM, start=False)
    device = DEVICES[name]()
    transport = driver.new_transport(device)
    try:
        transport.restore(state)
    except ConfigError:
        assert transport.status == 0
        return
    driver.kicks.clear()
    for index in range(len(device.queues)):
        for _ in range(3):
            transport.kick(index)
    transport.state()
    transport.reset()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("nonsense", [None, 7, "state", [], [{}], b"", {}], ids=repr)
def test_what_is_no_state_at_all_is_refused(name: str, nonsense: Any) -> None:
    driver = Driver(DEVICES[name](), memory_size=RAM, start=False)
    with pytest.raises(ConfigError):
        driver.new_transport(DEVICES[name]()).restore(nonsense)
    with suppress(ConfigError):  # rng has nothing that it must have
        DEVICES[name]().restore(nonsense)


@pytest.mark.parametrize("path", [("status",), ("device", "mtu"), ("queues",), ("queues", 0, "size")], ids=str)
@pytest.mark.parametrize("value", [10**5000, [10**5000]], ids=["number", "list"])
def test_a_number_too_long_to_be_printed_is_refused_all_the_same(path: tuple[Any, ...], value: object) -> None:
    driver = Driver(DEVICES["net"](), memory_size=RAM, start=False)
    with pytest.raises(ConfigError, match="digits"):
        driver.new_transport(DEVICES["net"]()).restore(changed(SAVED["net"], path, value))


@pytest.mark.parametrize(
    "change",
    [
        {"status": 0x7},
        {"status": 0x1F},
        {"status": 0x100},
        {"acked": 0},
        {"acked": 1 << 28},
        {"wanted": 0},
        {"device_id": True},
        {"status": 0x3},
        {"interrupt_status": 4},
    ],
    ids=repr,
)
def test_registers_that_do_not_fit_each_other_are_refused(change: dict[str, Any]) -> None:
    driver = Driver(DEVICES["net"](), memory_size=RAM)
    state = driver.transport.state()
    with pytest.raises(ConfigError) as caught:
        driver.new_transport(DEVICES["net"]()).restore(state | change)
    assert caught.value.expected is not None
    assert caught.value.found is not None


@pytest.mark.parametrize("name", ["blk", "console", "rng"])
def test_a_configuration_space_that_the_device_never_had_is_refused(name: str) -> None:
    driver = Driver(DEVICES[name](), memory_size=RAM)
    state = driver.transport.state()
    wrong = (b"\xff" + bytes.fromhex(state["config"])[1:]).hex()
    with pytest.raises(ConfigError, match="config"):
        driver.new_transport(DEVICES[name]()).restore(state | {"config": wrong})


def test_the_cache_mode_of_a_disk_is_restored_as_the_driver_left_it() -> None:
    driver = Driver(DEVICES["blk"](), memory_size=RAM)
    driver.write(0x100 + 32, 0, 1)
    device = blk()
    transport = driver.new_transport(device)
    transport.restore(driver.transport.state())
    assert device.writes_through
    assert transport.state() == driver.transport.state()
    assert driver.interrupts == 1  # for the change before the snapshot


@pytest.mark.parametrize("name", ["net", "vsock"])
def test_a_configuration_space_is_made_anew_from_what_the_device_saved(name: str) -> None:
    driver = Driver(DEVICES[name](), memory_size=RAM)
    state = driver.transport.state()
    transport = driver.new_transport(DEVICES[name]())
    transport.restore(state | {"config": "ff" * (len(state["config"]) // 2)})
    assert transport.state()["config"] == state["config"]


def test_a_driver_that_was_told_of_a_cable_unplugged_is_told_that_it_is_plugged_in_again() -> None:
    device = DEVICES["net"]()
    assert isinstance(device, VirtioNet)
    driver = Driver(device, memory_size=RAM)
    device.set_link(False)
    state = driver.transport.state()
    driver.transport = driver.new_transport(DEVICES["net"]())
    interrupts = driver.interrupts
    driver.transport.restore(state)
    assert driver.interrupts == interrupts + 1
    assert driver.acknowledge() & 2
    assert driver.config(6, 2) == b"\1\0"
    assert driver.transport.state()["config_generation"] != state["config_generation"]


def test_a_card_whose_cable_was_plugged_in_hears_of_nothing() -> None:
    driver = Driver(DEVICES["net"](), memory_size=RAM)
    state = driver.transport.state()
    driver.new_transport(DEVICES["net"]()).restore(state)
    assert driver.interrupts == 0
