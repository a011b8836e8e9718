"""Reads an ELF64 kernel (vmlinux) and checks each header field against the file, PVH note included.

Facts: the System V ABI (ELF-64 object file format), Xen's PVH ABI (note XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

import attrs

from asyncvmm.errors import KernelError
from asyncvmm.x86.filetype import elf_type_name, machine_name
from asyncvmm.x86.layout import HOLE_START, KERNEL_ADDRESS, Region

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")

ELFCLASS64 = 2
ELFDATA2LSB = 1
ET_EXEC = 2
EM_X86_64 = 62
PT_LOAD = 1
PT_INTERP = 3
PT_NOTE = 4
XEN_ELFNOTE_PHYS32_ENTRY = 18

MAX_PROGRAM_HEADERS = 256
MAX_NOTE_BYTES = 64 * 1024


@attrs.frozen
class ElfSegment:
    """One PT_LOAD: ``data`` goes to physical ``address``; the rest up to ``memory_size`` is zeros."""

    address: int
    data: memoryview = attrs.field(repr=False)
    memory_size: int

    @property
    def region(self) -> Region:
        """The guest memory it takes, zeros included."""
        return Region(self.address, self.memory_size)


@attrs.frozen(kw_only=True)
class ElfKernel:
    """A checked ELF64 kernel. ``entry`` is where the 64-bit protocol enters, ``pvh_entry`` where PVH does (32-bit
    protected mode), None without the note; both physical. ``segments`` are sorted and do not overlap."""

    segments: tuple[ElfSegment, ...]
    entry: int
    pvh_entry: int | None

    @property
    def work_area(self) -> Region:
        """From the first segment's start to the last one's end."""
        start = self.segments[0].address
        return Region(start, self.segments[-1].region.end - start)

    def check_entry(self, *, pvh: bool) -> int:
        """The entry point of the PVH or of the 64-bit protocol. Raises KernelError if it is not in the file's code."""
        what, entry = ("PVH entry", self.pvh_entry) if pvh else ("ELF entry", self.entry)
        if entry is None:
            raise KernelError("ELF kernel", expected="a PVH note", found="none")
        if not any(segment.address <= entry < segment.address + len(segment.data) for segment in self.segments):
            raise KernelError(what, expected="an address inside a loaded segment", found=f"{entry:#x}")
        return entry


@attrs.frozen
class _ProgramHeader:
    type: int
    offset: int
    address: int
    file_size: int
    memory_size: int


def is_elf(image: memoryview) -> bool:
    """Whether the ELF magic is there."""
    return bytes(image[:4]) == b"\x7fELF"


def parse_elf(image: memoryview) -> ElfKernel:
    """The ELF64 kernel in ``image``, the whole file. Raises KernelError with what was expected and found."""
    entry, offset, count = _file_header(image)
    headers = _program_headers(image, offset, count)
    if any(header.type == PT_INTERP for header in headers):
        raise KernelError("kernel", expected="an x86-64 kernel", found="a program (it names an ELF interpreter)")
    segments = _segments(image, headers)
    kernel = ElfKernel(segments=segments, entry=entry, pvh_entry=_pvh_entry(image, headers))
    kernel.check_entry(pvh=kernel.pvh_entry is not None)
    return kernel


def check_elf_header(image: memoryview) -> None:
    """Refuse what the file header alone shows to be no kernel of ours. Raises KernelError."""
    if len(image) < _HEADER.size:
        raise KernelError("truncated ELF", expected=f"at least {_HEADER.size} bytes", found=f"{len(image)} bytes")
    ident, kind, machine, *_ = _HEADER.unpack_from(image)
    if ident[4] != ELFCLASS64 or ident[5] != ELFDATA2LSB:
        bits = {1: "32-bit", 2: "64-bit"}.get(ident[4], f"class {ident[4]}")
        order = {1: "little-endian", 2: "big-endian"}.get(ident[5], f"byte order {ident[5]}")
        raise KernelError("ELF kernel", expected="a 64-bit little-endian ELF", found=f"a {bits} {order} ELF")
    if machine != EM_X86_64:
        raise KernelError("ELF kernel", expected="an ELF for x86-64", found=f"an ELF for {machine_name(machine)}")
    if kind != ET_EXEC:
        raise KernelError("ELF kernel", expected="an executable", found=elf_type_name(kind))


def _file_header(image: memoryview) -> tuple[int, int, int]:
    check_elf_header(image)
    _, _, _, _, entry, offset, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(image)
    if entry_size != _PROGRAM_HEADER.size:
        raise KernelError("ELF program header size", expected=_PROGRAM_HEADER.size, found=entry_size)
    if not 1 <= count <= MAX_PROGRAM_HEADERS:
        raise KernelError("ELF program headers", expected=f"1 to {MAX_PROGRAM_HEADERS}", found=count)
    _check_file_range("ELF program headers", image, offset, count * entry_size)
    return entry, offset, count


def _program_headers(image: memoryview, offset: int, count: int) -> tuple[_ProgramHeader, ...]:
    table = image[offset : offset + count * _PROGRAM_HEADER.size]
    return tuple(
        _ProgramHeader(kind, start, address, file_size, memory_size)
        for kind, _, start, _, address, file_size, memory_size, _ in _PROGRAM_HEADER.iter_unpack(table)
    )


def _segments(image: memoryview, headers: Sequence[_ProgramHeader]) -> tuple[ElfSegment, ...]:
    loads = [header for header in headers if header.type == PT_LOAD and header.memory_size]
    segments = tuple(sorted((_segment(image, header) for header in loads), key=lambda segment: segment.address))
    if not segments:
        raise KernelError("ELF kernel", expected="at least one PT_LOAD segment", found="none")
    for lower, upper in pairwise(segments):
        if lower.region.end > upper.address:
            expected = f"from {lower.region.end:#x} on"
            raise KernelError("overlapping ELF segment", expected=expected, found=f"{upper.address:#x}")
    return segments


def _segment(image: memoryview, header: _ProgramHeader) -> ElfSegment:
    _check_file_range("ELF segment", image, header.offset, header.file_size)
    if header.file_size > header.memory_size:
        expected = f"at most {header.memory_size} bytes (memsz)"
        raise KernelError("ELF segment's filesz", expected=expected, found=f"{header.file_size} bytes")
    end = header.address + header.memory_size
    if header.address < KERNEL_ADDRESS or end > HOLE_START:
        expected = f"inside {KERNEL_ADDRESS:#x}..{HOLE_START:#x}"
        raise KernelError("ELF segment's address", expected=expected, found=f"{header.address:#x}..{end:#x}")
    return ElfSegment(header.address, image[header.offset : header.offset + header.file_size], header.memory_size)


def _pvh_entry(image: memoryview, headers: Sequence[_ProgramHeader]) -> int | None:
    for header in headers:
        if header.type != PT_NOTE:
            continue
        _check_file_range("ELF notes", image, header.offset, header.file_size)
        for name, kind, description in _notes(image[header.offset : header.offset + header.file_size]):
            if name == b"Xen\0" and kind == XEN_ELFNOTE_PHYS32_ENTRY:
                return _note_value(description)
    return None


def _notes(table: memoryview) -> Iterator[tuple[bytes, int, memoryview]]:
    """Name, type and description of each whole note; stops at the first one that leaves the table."""
    table = table[:MAX_NOTE_BYTES]
    offset = 0
    while offset + _NOTE.size <= len(table):
        name_size, size, kind = _NOTE.unpack_from(table, offset)
        name_start = offset + _NOTE.size
        start = name_start + _align4(name_size)
        offset = start + _align4(size)
        if start + size > len(table):
            return
        yield bytes(table[name_start : name_start + name_size]), kind, table[start : start + size]


def _note_value(description: memoryview) -> int:
    if len(description) not in (4, 8):
        raise KernelError("PVH note", expected="an address of 4 or 8 bytes", found=f"{len(description)} bytes")
    return int.from_bytes(description, "little")


def _check_file_range(what: str, image: memoryview, offset: int, size: int) -> None:
    if offset + size > len(image):
        expected = f"at least {offset + size} bytes of file"
        raise KernelError(f"{what} outside the file", expected=expected, found=f"{len(image)} bytes")


def _align4(size: int) -> int:
    return (size + 3) & ~3
