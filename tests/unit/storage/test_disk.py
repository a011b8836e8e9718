from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.device_config import DriveConfig
from asyncvmm.devices.virtio.block_io import BlockRequest, Operation
from asyncvmm.devices.virtio.queue import Chain
from asyncvmm.errors import DriveBusy, DriveError
from asyncvmm.storage.disk import HOLD_NS, MOST_READ_NOW, Disk, open_disk
from asyncvmm.storage.image import Buffer
from asyncvmm.storage.overlay import make_overlay
from asyncvmm.storage.raw import RawImage
from asyncvmm.storage.work import MOST_MERGED, merged
from tests.support.cancelling import cancel_work

CONTENT = os.urandom(1 << 20)
pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def request(
    operation: Operation, offset: int = 0, size: int = 0, data: bytes = b"", sync: bool = False
) -> BlockRequest:
    views = [memoryview(data)] if data else []
    return BlockRequest(Chain(0, 0), operation, offset=offset, size=size or len(data), views=views, sync=sync)


class Delivered:
    """What a disk gave back, batch by batch."""

    def __init__(self, disk: Disk) -> None:
        self.batches: list[Sequence[BlockRequest]] = []
        self._arrived = asyncio.Event()
        self._loop_thread = threading.get_ident()
        disk.start(asyncio.get_running_loop(), self._take)

    def _take(self, batch: Sequence[BlockRequest]) -> None:
        assert threading.get_ident() == self._loop_thread
        assert batch
        self.batches.append(batch)
        self._arrived.set()

    @property
    def requests(self) -> list[BlockRequest]:
        return [request for batch in self.batches for request in batch]

    async def wait(self, count: int) -> list[BlockRequest]:
        with anyio.fail_after(20):
            while len(self.requests) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.requests


class Stuck(RawImage):
    """An image on a disk that hangs until ``go``, as a file system whose server is gone does."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR), path.stat().st_size)
        self.hanging, self.go = threading.Event(), threading.Event()

    def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
        self.hanging.set()
        self.go.wait(30)
        super().write(offset, views, sync=sync)


async def test_requests_come_back_in_their_order_with_what_they_asked_for(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path, id="data"))
    delivered = Delivered(disk)
    sent = [
        request(Operation.READ, 512, 1024),
        request(Operation.WRITE, 0, data=b"w" * 4096),
        request(Operation.FLUSH),
        request(Operation.READ, 0, 512),
    ]
    disk.submit(sent)
    assert await delivered.wait(4) == sent
    assert sent[0].result == CONTENT[512:1536]
    assert sent[3].result == b"w" * 512
    assert [entry.failed for entry in sent] == [None] * 4
    assert await disk.aclose()
    assert content(path) == b"w" * 4096 + CONTENT[4096:]


async def test_a_closed_disk_has_carried_out_what_it_was_given(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    delivered = Delivered(disk)
    for number in range(200):
        disk.submit([request(Operation.WRITE, number * 512, data=bytes([number]) * 512)])
    assert await disk.aclose()
    assert len(delivered.requests) == 200
    assert content(path)[: 200 * 512] == b"".join(bytes([number]) * 512 for number in range(200))
    open_again = await open_disk(DriveConfig(path=path))
    assert await open_again.aclose()


async def test_neighbours_are_carried_out_as_one_and_come_back_one_by_one(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    delivered = Delivered(disk)
    sent = [request(Operation.READ, number * 512, 512) for number in range(64)]
    disk.submit(sent)
    assert [entry.result for entry in await delivered.wait(64)] == [
        CONTENT[number * 512 : (number + 1) * 512] for number in range(64)
    ]
    assert await disk.aclose()


async def test_a_failing_request_says_why_and_the_disk_goes_on(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path, read_only=True))
    delivered = Delivered(disk)
    disk.submit([request(Operation.WRITE, 0, data=b"x" * 512), request(Operation.READ, 0, 512)])
    failed, read = await delivered.wait(2)
    assert "Bad file descriptor" in (failed.failed or "")
    assert read.result == CONTENT[:512]
    assert await disk.aclose()


async def test_a_hung_disk_holds_nobody_up(path: Path) -> None:
    image = Stuck(path)
    disk = Disk(image)
    delivered = Delivered(disk)
    disk.submit([request(Operation.WRITE, 0, data=b"x" * 512)])
    disk.submit([request(Operation.WRITE, 512, data=b"y" * 512)])
    await anyio.to_thread.run_sync(image.hanging.wait)
    assert not await disk.aclose(timeout_s=0.05)
    assert delivered.requests == []
    image.go.set()
    assert await disk.aclose()
    assert [entry.failed for entry in delivered.requests] == [None, "abandoned"]
    assert content(path)[:1024] == b"x" * 512 + CONTENT[512:1024]


async def test_what_is_done_comes_back_without_what_takes_long(path: Path) -> None:
    class Slow(Stuck):
        def write(self, offset: int, views: Sequence[Buffer], *, sync: bool = False) -> None:
            if offset:
                return super().write(offset, views, sync=sync)
            time.sleep(2e-9 * HOLD_NS)
            return RawImage.write(self, offset, views, sync=sync)

    image = Slow(path)
    disk = Disk(image)
    delivered = Delivered(disk)
    first, second = (request(Operation.WRITE, offset, data=bytes(512)) for offset in (0, 4096))
    disk.submit([first, second])
    assert await delivered.wait(1) == [first]
    image.go.set()
    assert await delivered.wait(2) == [first, second]
    assert await disk.aclose()


async def test_small_requests_of_a_batch_come_back_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncvmm.storage.disk.HOLD_NS", 1 << 60)
    disk = await open_disk(DriveConfig(path=path))
    delivered = Delivered(disk)
    disk.submit([request(Operation.WRITE, 8192 * number, data=bytes(512)) for number in range(4)])
    await delivered.wait(4)
    assert len(delivered.batches) == 1
    assert await disk.aclose()


async def test_closing_a_hung_disk_can_be_cancelled(path: Path) -> None:
    image = Stuck(path)
    disk = Disk(image)
    Delivered(disk)
    disk.submit([request(Operation.WRITE, 0, data=b"x" * 512)])
    await anyio.to_thread.run_sync(image.hanging.wait)
    with anyio.move_on_after(0.05) as scope:
        await disk.aclose(timeout_s=30)
    assert scope.cancelled_caught
    image.go.set()
    assert await disk.aclose()


async def test_what_was_abandoned_comes_back_undone(path: Path) -> None:
    image = Stuck(path)
    disk = Disk(image)
    delivered = Delivered(disk)
    disk.submit([request(Operation.WRITE, 0, data=b"x" * 512)])
    disk.submit([request(Operation.WRITE, 512, data=b"y" * 512), request(Operation.FLUSH)])
    await anyio.to_thread.run_sync(image.hanging.wait)
    await anyio.to_thread.run_sync(disk.abandon)
    disk.submit([request(Operation.WRITE, 1024, data=b"z" * 512)])
    image.go.set()
    done = await delivered.wait(4)
    assert [entry.failed for entry in done] == [None, "abandoned", "abandoned", None]
    assert await disk.aclose()
    assert content(path)[:1536] == b"x" * 512 + CONTENT[512:1024] + b"z" * 512


async def test_a_closed_disk_refuses_what_comes_later(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    delivered = Delivered(disk)
    disk.close()
    disk.submit([request(Operation.FLUSH)])
    assert disk.read_now(0, 512) is None
    assert [entry.failed for entry in await delivered.wait(1)] == ["the disk is closed"]
    assert await disk.aclose()


async def test_what_is_in_the_page_cache_is_there_at_once(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    delivered = Delivered(disk)
    disk.submit([request(Operation.READ, 0, len(CONTENT))])
    await delivered.wait(1)
    assert bytes(disk.read_now(512, 1024) or b"") == CONTENT[512:1536]
    assert bytes(disk.read_now(0, 512) or b"") == CONTENT[:512]
    assert bytes(disk.read_now(0, len(CONTENT)) or b"") == CONTENT
    assert disk.read_now(0, MOST_READ_NOW + 512) is None
    assert await disk.aclose()


async def test_a_disk_that_never_started_closes_as_well(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    assert await disk.aclose()
    assert await disk.aclose()
    assert await (await open_disk(DriveConfig(path=path))).aclose()


async def test_after_the_end_neither_thread_nor_descriptor_is_left(path: Path) -> None:
    before = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    for _ in range(5):
        disk = await open_disk(DriveConfig(path=path))
        Delivered(disk)
        assert await disk.aclose()
    await anyio.sleep(0.05)
    after = (threading.active_count(), len(os.listdir("/proc/self/fd")))
    assert after[0] <= before[0] + 1  # anyio's worker
    assert after[1] <= before[1] + 1


async def test_a_drive_in_use_is_refused_by_name(path: Path) -> None:
    disk = await open_disk(DriveConfig(path=path))
    with pytest.raises(DriveBusy, match=r"^drive: .*disk\.img in use"):
        await open_disk(DriveConfig(path=path))
    with pytest.raises(DriveBusy, match=r"^drive data: .*disk\.img in use"):
        await open_disk(DriveConfig(path=path, id="data"))
    assert await disk.aclose()


async def test_a_drive_that_cannot_be_opened_is_refused_with_its_id(tmp_path: Path) -> None:
    with pytest.raises(DriveError, match=r"^drive data: .*nosuch"):
        await open_disk(DriveConfig(path=tmp_path / "nosuch", id="data"))


@pytest.mark.parametrize("turns", range(4))
async def test_opening_can_be_cancelled_without_leaving_the_image_locked(path: Path, turns: int) -> None:
    await cancel_work(turns, open_disk(DriveConfig(path=path)))
    for _ in range(100):
        try:
            disk = await open_disk(DriveConfig(path=path))
            break
        except DriveBusy:
            await anyio.sleep(0.02)
    assert await disk.aclose()


async def test_a_clone_is_a_disk_like_any_other(path: Path, tmp_path: Path) -> None:
    overlay = make_overlay(path, tmp_path / "clone.img")
    disk = await open_disk(DriveConfig(path=path, overlay=tmp_path / "clone.img"), overlay)
    delivered = Delivered(disk)
    disk.submit([request(Operation.WRITE, 512, data=b"c" * 512), request(Operation.READ, 0, 2048)])
    assert (await delivered.wait(2))[1].result == CONTENT[:512] + b"c" * 512 + CONTENT[1024:2048]
    assert await disk.aclose()
    assert content(path) == CONTENT


async def test_an_image_that_cannot_be_written_whole_is_in_the_log(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(RawImage):
        def close(self) -> None:
            super().close()
            raise OSError(28, "No space left on device")

    disk = Disk(Full(os.open(path, os.O_RDWR), len(CONTENT)), name="data")
    Delivered(disk)
    assert await disk.aclose()
    assert disk.problem == "No space left on device"
    assert "image of data could not be written whole" in caplog.text


Plan = list[tuple[Operation, int, int, bool]]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Operation), st.integers(0, 6), st.sampled_from([1, 1, 2, MOST_MERGED // 512]), st.booleans()
        )
    )
)
def test_merging_keeps_the_order_and_joins_true_neighbours_only(plan: Plan) -> None:
    batch = [request(kind, start * 512, count * 512, sync=sync) for kind, start, count, sync in plan]
    groups = list(merged(batch))
    assert [entry for group in groups for entry in group] == batch
    for group in groups:
        assert len(group) == 1 or sum(entry.size for entry in group) <= MOST_MERGED
        for before, after in pairwise(group):
            assert before.operation is after.operation
            assert before.operation in (Operation.READ, Operation.WRITE)
            assert (before.offset + before.size, before.sync) == (after.offset, after.sync)
