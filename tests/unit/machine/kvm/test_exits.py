from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.machine.kvm.exits import (
    EXIT_REASON_WORD,
    IO_COUNT_WORD,
    IO_DATA_OFFSET_QUAD,
    IO_KEY_WORD,
    MMIO_DATA,
    Exit,
    FailEntryExit,
    HltExit,
    InternalErrorExit,
    IoExit,
    MmioExit,
    OtherExit,
    ShutdownExit,
    decode,
    exit_name,
    io_key,
)

PAGE = 3 * 4096
DATA_OFFSET = 4096


def page(reason: int, union: bytes = b"", data: bytes = b"") -> memoryview:
    """A kvm_run page: request_interrupt_window … exit_reason at 8, the union at 32, PIO data a page behind."""
    run = bytearray(PAGE)
    struct.pack_into("<I", run, 8, reason)
    run[32 : 32 + len(union)] = union
    run[DATA_OFFSET : DATA_OFFSET + len(data)] = data
    return memoryview(run)


def io_page(is_out: int, size: int, port: int, count: int, data: bytes = b"") -> memoryview:
    return page(2, struct.pack("<BBHIQ", is_out, size, port, count, DATA_OFFSET), data)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_out_carries_its_data(size: int) -> None:
    run = io_page(1, size, 0x3F8, 1, b"abcdefgh")
    assert decode(run) == IoExit(True, size, 0x3F8, 1, DATA_OFFSET, b"abcdefgh"[:size])


def test_a_string_out_carries_all_of_its_data() -> None:
    assert decode(io_page(1, 2, 0x3F8, 3, b"abcdefgh")) == IoExit(True, 2, 0x3F8, 3, DATA_OFFSET, b"abcdef")


def test_an_in_carries_no_data() -> None:
    assert decode(io_page(0, 4, 0x3FD, 1, b"left over")) == IoExit(False, 4, 0x3FD, 1, DATA_OFFSET)


@given(is_out=st.booleans(), size=st.sampled_from([1, 2, 4]), port=st.integers(0, 0xFFFF), count=st.integers(1, 1024))
def test_the_words_of_the_hot_path_stand_where_the_decoder_reads(
    is_out: bool, size: int, port: int, count: int
) -> None:
    run = io_page(is_out, size, port, count)
    words, quads = run.cast("I"), run.cast("Q")
    assert words[EXIT_REASON_WORD] == 2
    assert words[IO_KEY_WORD] == io_key(is_out, size, port)
    assert words[IO_COUNT_WORD] == count
    assert quads[IO_DATA_OFFSET_QUAD] == DATA_OFFSET


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_mmio_write_carries_as_many_bytes_as_it_has(size: int) -> None:
    run = page(6, struct.pack("<Q8sIB", 0xFEC00000, b"abcdefgh", size, 1))
    assert decode(run) == MmioExit(True, 0xFEC00000, size, b"abcdefgh"[:size])
    assert bytes(run[MMIO_DATA : MMIO_DATA + 8]) == b"abcdefgh"


def test_an_mmio_read_carries_no_data() -> None:
    assert decode(page(6, struct.pack("<Q8sIB", 1 << 40, b"leftover", 4, 0))) == MmioExit(False, 1 << 40, 4)


def test_hlt_shutdown_and_failed_entry_are_told_apart() -> None:
    assert decode(page(5)) == HltExit()
    assert decode(page(8)) == ShutdownExit()
    assert decode(page(9, struct.pack("<QI", 0x80000021, 3))) == FailEntryExit(0x80000021, 3)


def emulation_failure(count: int, flags: int, size: int, data: bytes) -> InternalErrorExit:
    current = decode(page(17, struct.pack("<IIQB", 1, count, flags, size) + data))
    assert isinstance(current, InternalErrorExit)
    return current


def test_an_emulation_failure_carries_its_instruction_where_kvm_tells() -> None:
    current = emulation_failure(3, 1, 4, bytes.fromhex("f30fb8d8") + b"\x90" * 11)
    assert current.is_emulation_failure
    assert current.instruction == bytes.fromhex("f30fb8d8")


@pytest.mark.parametrize(("count", "flags"), [(0, 1), (2, 1), (3, 0), (3, 2)])
def test_an_emulation_failure_without_bytes_has_none(count: int, flags: int) -> None:
    current = emulation_failure(count, flags, 4, b"\x90" * 15)
    assert current.is_emulation_failure
    assert current.instruction == b""


def test_an_instruction_is_never_longer_than_a_processor_takes() -> None:
    assert emulation_failure(4, 1, 255, b"\x90" * 200).instruction == b"\x90" * 15


def test_another_internal_error_is_no_emulation_failure() -> None:
    current = decode(page(17, struct.pack("<IIQ", 3, 1, 1)))
    assert current == InternalErrorExit(3)
    assert not current.is_emulation_failure


def test_a_reason_without_a_class_keeps_its_name_or_number() -> None:
    assert decode(page(24)) == OtherExit(24)
    assert OtherExit(24).name == exit_name(24) == "SYSTEM_EVENT"
    assert OtherExit(31).name == exit_name(31) == "DIRTY_RING_FULL"
    assert OtherExit(4242).name == exit_name(4242) == "reason 4242"


@given(reason=st.integers(0, 40), union=st.binary(max_size=256))
def test_no_page_makes_the_decoder_raise(reason: int, union: bytes) -> None:
    current: Exit = decode(page(reason, union))
    if isinstance(current, IoExit):
        assert len(current.data) <= PAGE
    if isinstance(current, MmioExit):
        assert current.size <= 8
