"""QEMU's migration stream without the guest's memory, as it is laid out by migration/savevm.c and migration/ram.c."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncvmm.errors import SnapshotFailed
from asyncvmm.machine.qemu.migration_stream import PAGE, RamFilter

SIZE = 16 * PAGE
ZERO, MEM_SIZE, DATA, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20

Record = tuple[str, int, bytes]
"""A block's name, an offset in it, and a page, or one byte for a page of them."""


def text(value: str, width: int = 1) -> bytes:
    return len(value).to_bytes(width) + value.encode()


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


HEADER = b"QEVM" + u32(3)
CONFIGURATION = b"\7" + text("microvm", 4)
CAPABILITIES = b"\5" + text("configuration/capabilities") + u32(1) + u32(1) + text("x-ignore-shared")
FOOTER = b"\x7e" + u32(2)
DEVICE = b"\4" + u32(3) + text("timer") + u32(0) + u32(2) + b"whatever\1\2\3" + b"\x7e" + u32(3)


def start(size: int = SIZE) -> bytes:
    blocks = text("ram") + u64(size) + u64(0) + text("pc.bios") + u64(PAGE) + u64(0xFFFF0000)
    return b"\1" + u32(2) + text("ram") + u32(0) + u32(4) + u64(size + PAGE | MEM_SIZE) + blocks + u64(EOS) + FOOTER


def part(records: list[Record], kind: int = 2) -> bytes:
    data, last = b"", None
    for name, offset, page in records:
        flags = (DATA if len(page) == PAGE else ZERO) | (CONTINUE if name == last else 0)
        data += u64(offset | flags) + (b"" if name == last else text(name)) + page
        last = name
    return bytes([kind]) + u32(2) + data + u64(EOS) + FOOTER


def stream(*parts: bytes) -> bytes:
    return HEADER + CONFIGURATION + CAPABILITIES + start() + b"".join(parts) + DEVICE + b"\0"


def pages_of(block: str, data: bytes) -> dict[int, bytes]:
    return filtered(data, block=block, size=PAGE)[1]


def filtered(
    data: bytes, piece: int = 1 << 20, *, block: str = "ram", size: int = SIZE
) -> tuple[bytes, dict[int, bytes]]:
    pages: dict[int, bytes] = {}

    def take(offset: int, data: bytes) -> None:
        pages.update({offset + at: data[at : at + PAGE] for at in range(0, len(data), PAGE)})

    ram = RamFilter(block, size, take)
    for at in range(0, len(data), piece):
        ram.feed(data[at : at + piece])
    return ram.finish(), pages


def test_a_stream_without_the_guests_memory_stays_as_it_is() -> None:
    data = stream(part([("pc.bios", 0, b"b" * PAGE)]), part([], 3))
    assert filtered(data) == (data, {})


def test_the_guests_pages_are_taken_out_and_others_are_left() -> None:
    bios: Record = ("pc.bios", 0, b"b" * PAGE)
    mixed = [("ram", 0, b"0" * PAGE), ("ram", PAGE, b"1" * PAGE), bios, ("ram", 3 * PAGE, b"3" * PAGE)]
    rest, pages = filtered(stream(part(mixed), part([("ram", 5 * PAGE, b"5" * PAGE)], 3)))
    assert rest == stream(part([bios]), part([], 3))
    assert pages == {n * PAGE: str(n).encode() * PAGE for n in (0, 1, 3, 5)}


def test_a_page_that_came_twice_counts_as_it_came_last() -> None:
    twice = part([("ram", 0, b"a" * PAGE), ("ram", 0, b"b" * PAGE)])
    assert filtered(stream(twice))[1] == {0: b"b" * PAGE}


def test_pages_of_zeros_leave_no_trace_unless_there_was_something() -> None:
    zeros = part([("ram", 0, b"\0"), ("ram", PAGE, b"a" * PAGE), ("ram", PAGE, b"\0"), ("ram", 2 * PAGE, b"\7")])
    assert filtered(stream(zeros))[1] == {PAGE: bytes(PAGE), 2 * PAGE: b"\7" * PAGE}


def test_a_machine_without_capabilities_is_read_too() -> None:
    data = HEADER + CONFIGURATION + start() + DEVICE
    assert filtered(data)[0] == data


records = st.lists(
    st.tuples(
        st.sampled_from(["ram", "ram", "pc.bios"]),
        st.integers(0, 15).map(lambda n: n * PAGE),
        st.sampled_from([b"p" * PAGE, b"q" * PAGE, b"\0"]),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(records, st.integers(1, 5000))
def test_however_the_stream_is_cut_the_outcome_is_the_same(found: list[Record], piece: int) -> None:
    data = stream(part(found))
    rest, pages = filtered(data, piece)
    assert (rest, pages) == filtered(data)
    assert pages_of("pc.bios", rest) == pages_of("pc.bios", data)
    written = {offset: page for name, offset, page in found if name == "ram" and page != b"\0"}
    last = {offset: page for name, offset, page in found if name == "ram"}
    assert pages == {offset: last[offset] if last[offset] != b"\0" else bytes(PAGE) for offset in written}


@settings(deadline=None)
@given(st.data())
def test_a_stream_that_is_cut_off_is_none(data: st.DataObject) -> None:
    whole = stream(part([("ram", 0, b"p" * PAGE)]))
    memory = len(whole) - len(DEVICE) - 1
    with pytest.raises(SnapshotFailed, match="cut off"):
        filtered(whole[: data.draw(st.integers(0, memory))])


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_what_is_no_stream_is_refused_and_nothing_worse(data: bytes) -> None:
    for found in (data, HEADER + data, HEADER + CONFIGURATION + CAPABILITIES + data):
        with suppress(SnapshotFailed):
            filtered(found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"QEVM" + u32(2), "a migration stream"),
        (HEADER + b"\6", "type 0x6"),
        (HEADER + CONFIGURATION + b"\5" + text("configuration/uuid"), "configuration/uuid"),
        (HEADER + CONFIGURATION + b"\1" + u32(2) + text("block"), "memory first"),
        (HEADER + CONFIGURATION + start(SIZE + PAGE), f"expected {SIZE} bytes of memory"),
        (HEADER + CONFIGURATION + b"\7" + u32(1 << 30), "a name of at most"),
        (HEADER + CONFIGURATION + start() + b"\2" + u32(2) + u64(0x40), "flags 0x40"),
        (HEADER + CONFIGURATION + start() + b"\2" + u32(2) + u64(EOS) + b"\0" * 5, "the end of a section"),
    ],
)
def test_what_is_unexpected_is_named(data: bytes, words: str) -> None:
    with pytest.raises(SnapshotFailed) as caught:
        filtered(data + bytes(PAGE))
    assert words in str(caught.value)


def test_a_state_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncvmm.machine.qemu.migration_stream.MOST_BYTES", 1000)
    with pytest.raises(SnapshotFailed, match="at most 1000 bytes"):
        filtered(stream() + bytes(1000))
