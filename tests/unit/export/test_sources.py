"""Sources that are followed: nothing lost, nothing read twice, whatever becomes of the file."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from asyncvmm.export import sources
from asyncvmm.export.sources import Source

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(sources, "POLL_S", 0.01)


async def next_of(path: Path, source: Source, *changes: object) -> list[bytes]:
    """What the source gives: at first, and after each change."""
    heard = []
    chunks = source.chunks(follow=True)
    with anyio.fail_after(30):
        heard.append(await anext(chunks))
        for change in changes:
            assert callable(change)
            change(path)
            heard.append(await anext(chunks))
    await chunks.aclose()  # type: ignore[attr-defined]
    source.close()
    source.close()
    return heard


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more\n")


def nothing(path: Path) -> None:
    pass


def rotate(path: Path) -> None:
    """The old file is written to until the moment it is replaced."""
    append(path)
    path.rename(path.with_suffix(".1"))
    path.write_bytes(b"new\n")


def cut(path: Path) -> None:
    path.write_bytes(b"x\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with something in it."""
    path = tmp_path / "file"
    path.write_bytes(b"first\n")
    return path


async def test_what_is_appended_is_read(path: Path) -> None:
    assert await next_of(path, Source(str(path)), append, append) == [b"first\n", b"more\n", b"more\n"]


async def test_a_file_that_is_replaced_is_read_to_its_end_before_the_new_one(path: Path) -> None:
    heard = await next_of(path, Source(str(path)), rotate, nothing, nothing, append)
    assert heard == [b"first\n", b"more\n", b"", b"new\n", b"more\n"]


async def test_a_file_that_is_cut_short_is_read_from_its_start(path: Path) -> None:
    assert await next_of(path, Source(str(path)), cut, nothing) == [b"first\n", b"", b"x\n"]


async def test_a_file_that_is_removed_is_waited_for(path: Path) -> None:
    def remove_for_a_while(path: Path) -> None:
        path.unlink()
        tasks.start_soon(come_back)

    async def come_back() -> None:
        await anyio.sleep(0.1)
        await anyio.Path(path).write_bytes(b"back\n")

    async with anyio.create_task_group() as tasks:
        heard = await next_of(path, Source(str(path)), remove_for_a_while, nothing)
    assert heard == [b"first\n", b"", b"back\n"]
