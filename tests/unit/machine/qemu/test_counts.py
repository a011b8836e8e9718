from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.device_config import DriveConfig
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu import counts
from asyncvmm.machine.qemu.channel import Channel
from asyncvmm.machine.qemu.counts import DiskCounts, QemuCounts, stats_by_node, totals
from asyncvmm.metrics.groups import BlockMetrics
from asyncvmm.metrics.vm_metrics import VmMetrics

STATS = {
    "rd_bytes": 4096,
    "wr_bytes": 512,
    "rd_operations": 2,
    "wr_operations": 1,
    "flush_operations": 3,
    "rd_total_time_ns": 12_999,
    "wr_total_time_ns": 999,
    "failed_rd_operations": 1,
    "failed_unmap_operations": 1,
    "invalid_wr_operations": 5,
}


def plan(*drive_ids: str) -> BootPlan:
    drives = (DriveResource(DriveConfig(path="image", id=drive_id), Path("image")) for drive_id in drive_ids)
    resources = Resources(drives=tuple(drives))
    return BootPlan(name="counts", memory_mib=64, vcpus=1, kernel=Path("kernel"), initrd=None, resources=resources)


def answer(**stats_of_node: Mapping[str, int]) -> list[dict[str, object]]:
    """What QEMU answers to query-blockstats, as far as it matters."""
    return [{"device": "", "node-name": name, "stats": dict(stats)} for name, stats in stats_of_node.items()]


@attrs.define
class Qemu:
    """Is asked, and answers when it is told to."""

    asked: list[Callable[[Any], None]] = attrs.field(factory=list)
    news: anyio.Event = attrs.field(factory=anyio.Event)

    def ask(self, name: str, on_answer: Callable[[Any], None]) -> None:
        assert name == "query-blockstats"
        self.asked.append(on_answer)
        self.news.set()

    def answer(self, **stats_of_node: Mapping[str, int]) -> None:
        self.asked.pop(0)(answer(**stats_of_node))


@pytest.fixture
def qemu() -> Qemu:
    return Qemu()


@pytest.fixture
def metrics() -> VmMetrics:
    return VmMetrics()


# -- one answer --------------------------------------------------------------------------------------------------------


def test_a_disks_counts_have_the_names_of_ours() -> None:
    assert totals(STATS) == {
        "read_bytes": 4096,
        "write_bytes": 512,
        "read_count": 2,
        "write_count": 1,
        "flush_count": 3,
        "execute_fails": 2,
        "invalid_reqs_count": 5,
        "read_agg": 12,
        "write_agg": 0,
    }
    assert totals(STATS).keys() <= BlockMetrics().flush().keys()


def test_disks_are_found_by_their_node() -> None:
    assert stats_by_node(answer(drive0={"rd_bytes": 1}, drive1={"rd_bytes": 2})) == {
        "drive0": {"rd_bytes": 1},
        "drive1": {"rd_bytes": 2},
    }


json = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["node-name", "stats", "rd_bytes", "x"]), inner, max_size=3)
    ),
)


@given(json)
def test_an_answer_of_another_form_counts_nothing_and_breaks_nothing(strange: object) -> None:
    for stats in stats_by_node(strange).values():
        assert all(isinstance(total, int) for total in totals(stats).values())


@given(st.lists(st.integers(0, 1 << 60)))
def test_a_group_follows_its_disk_and_never_steps_back(seen: list[int]) -> None:
    group = BlockMetrics()
    disk = DiskCounts(group)
    for index, size in enumerate(seen):
        disk.take({"rd_bytes": size, "rd_total_time_ns": size * 1000})
        assert group.read_bytes == group.read_agg.sum_us == max(seen[: index + 1])


def test_a_second_qemu_counts_on_where_the_first_ended() -> None:
    group = BlockMetrics()
    DiskCounts(group).take(STATS)
    second = DiskCounts(group)
    second.take({"rd_bytes": 10})
    second.take({"rd_bytes": 25})
    assert group.read_bytes == 4096 + 25


# -- when it is asked --------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_disks_are_asked_for_again_and_again(
    metrics: VmMetrics, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "POLL_S", 0.005)
    counting = QemuCounts(metrics, plan("root", "data"))
    counting.watch_disks(qemu.ask)
    for size in (100, 250):
        qemu.news = anyio.Event()
        await qemu.news.wait()
        qemu.answer(drive0={"rd_bytes": size}, drive1={"wr_operations": 1}, drive9={"rd_bytes": 1})
    groups = metrics.flush(0, 0).groups
    counting.close()
    assert groups["block_root"]["read_bytes"] == groups["block"]["read_bytes"] == 250
    assert groups["block_data"]["write_count"] == 1
    assert groups.keys() & {"block_drive9", "block_drive0"} == set()


@pytest.mark.anyio
async def test_a_qemu_that_does_not_answer_is_not_asked_more(
    metrics: VmMetrics, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "POLL_S", 0.001)
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    await anyio.sleep(0.03)
    counting.refresh()
    assert len(qemu.asked) == 1
    counting.close()


@pytest.mark.anyio
async def test_after_its_end_qemu_is_asked_nothing(
    metrics: VmMetrics, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "POLL_S", 0.001)
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    counting.close()
    counting.close()
    counting.refresh()
    await counting.finish()
    await anyio.sleep(0.01)
    assert qemu.asked == []


@pytest.mark.anyio
async def test_without_disks_qemu_is_never_asked(metrics: VmMetrics, qemu: Qemu) -> None:
    counting = QemuCounts(metrics, plan())
    counting.watch_disks(qemu.ask)
    counting.refresh()
    await counting.finish()
    assert qemu.asked == []


# -- the last time -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_end_waits_for_a_last_answer_and_not_for_an_earlier_one(metrics: VmMetrics, qemu: Qemu) -> None:
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    counting.refresh()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(counting.finish)
        while len(qemu.asked) < 2:
            await checkpoint()
        qemu.answer(drive0={"rd_bytes": 1})
        await checkpoint()
        qemu.answer(drive0={"rd_bytes": 2})
    counting.close()
    assert metrics.block("root").read_bytes == 2


@pytest.mark.anyio
async def test_the_end_does_not_wait_for_a_qemu_that_hangs(
    metrics: VmMetrics, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "LAST_ANSWER_S", 0.01)
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    await counting.finish()
    await counting.finish()
    assert len(qemu.asked) == 1
    counting.close()


@pytest.mark.anyio
async def test_a_qemu_that_dies_meanwhile_ends_the_wait(
    metrics: VmMetrics, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "LAST_ANSWER_S", 3600)
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(counting.finish)
        await qemu.news.wait()
        counting.close()


@pytest.mark.anyio
async def test_a_cancellation_is_heard_after_the_last_answer(metrics: VmMetrics, qemu: Qemu) -> None:
    counting = QemuCounts(metrics, plan("root"))
    counting.watch_disks(qemu.ask)
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_soon(lambda: qemu.answer(drive0={"rd_bytes": 7}))
        await counting.finish()
    counting.close()
    assert metrics.block("root").read_bytes == 7


# -- ports -------------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_ports_count_what_passes_their_sockets_also_once_they_are_closed(metrics: VmMetrics) -> None:
    channels = [Channel(asyncio.get_running_loop()) for _ in range(3)]
    console, control, port = channels
    QemuCounts(metrics, plan()).watch_ports((console, control), [port])
    console.peer.sendall(b"Linux\n")
    control.peer.sendall(b"READY\n")
    port.peer.sendall(b"data")
    for channel in channels:
        channel.read()
    await control.write(b"go\n")
    await port.write(b"more data")
    for channel in channels:
        channel.close()
    groups = metrics.flush(0, 0).groups
    assert (groups["uart"]["write_count"], groups["uart"]["read_count"]) == (12, 3)
    assert (groups["console"]["tx_bytes_count"], groups["console"]["rx_bytes_count"]) == (4, 9)


@pytest.mark.anyio
async def test_the_ports_of_a_second_machine_are_counted_from_0(metrics: VmMetrics) -> None:
    for text in (b"first machine\n", b"second\n"):
        channel = Channel(asyncio.get_running_loop())
        QemuCounts(metrics, plan()).watch_ports([channel], [])
        channel.peer.sendall(text)
        channel.read()
        channel.close()
        assert metrics.flush(0, 0).groups["uart"]["write_count"] == len(text)
