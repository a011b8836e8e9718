"""The balloon against a model of it: anything in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncvmm.devices.virtio.balloon.device import DEFLATE, FREE_PAGE, INFLATE, REPORTING, STATS
from asyncvmm.devices.virtio.balloon.pages import PAGE_BYTES
from asyncvmm.devices.virtio.registers import CONFIG
from tests.support.balloon_guest import RAM, driven, words


class AnyDriver(RuleBasedStateMachine):
    """A driver that does anything, and a count of what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.driver, self.device, self.host = driven()
        self.expected = dict.fromkeys(("inflate_count", "deflate_count", "free_page_report_count"), 0)
        self.statistics = 0

    @rule(data=st.binary(min_size=1, max_size=64))
    def inflate(self, data: bytes) -> None:
        self.driver.request(INFLATE, [data])
        self.expected["inflate_count"] += 1

    @rule(pfns=st.lists(st.integers(0, 300), min_size=1, max_size=40))
    def inflate_pages(self, pfns: list[int]) -> None:
        self.driver.request(INFLATE, [words(*pfns)])
        self.expected["inflate_count"] += 1

    @rule(data=st.binary(min_size=1, max_size=64))
    def deflate(self, data: bytes) -> None:
        self.driver.request(DEFLATE, [data])
        self.expected["deflate_count"] += 1

    @rule(data=st.binary(min_size=1, max_size=64))
    def give_statistics(self, data: bytes) -> None:
        self.driver.send(STATS, [data])
        self.driver.kick(STATS)
        assert len(self.driver.used(STATS)) <= 1
        self.statistics += 1

    @rule()
    def ask_for_statistics(self) -> None:
        with self.device.session():
            self.device.request_stats()
        self.driver.used(STATS)

    @rule(sizes=st.lists(st.integers(1, 3 * PAGE_BYTES), min_size=1, max_size=4))
    def report(self, sizes: list[int]) -> None:
        self.driver.request(REPORTING, writable=sizes)
        self.expected["free_page_report_count"] += 1

    @rule(command=st.integers(0, 5), sizes=st.lists(st.integers(1, 3 * PAGE_BYTES), max_size=3))
    def hint(self, command: int, sizes: list[int]) -> None:
        self.driver.request(FREE_PAGE, [words(command)], sizes)

    @rule()
    def ask_for_hints(self) -> None:
        with self.device.session():
            self.device.start_hinting()

    @rule(offset=st.integers(0, 15), value=st.integers(0, (1 << 32) - 1))
    def write_config(self, offset: int, value: int) -> None:
        self.driver.write(CONFIG + offset, value)

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        self.driver.start()

    @invariant()
    def every_page_is_ram_and_every_request_is_counted(self) -> None:
        assert not self.driver.needs_reset
        assert all(address >= 0 and address + size <= RAM for address, size in self.host.released)
        metrics = self.device.metrics
        assert {name: getattr(metrics, name) for name in self.expected} == self.expected
        assert metrics.stats_updates_count + metrics.stats_update_fails == self.statistics


TestAnyDriver = AnyDriver.TestCase
TestAnyDriver.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
