"""Kernels made up for the tests: small, and valid to the last header field."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings

from asyncvmm.guest.image import find_image
from tests.support.requirements import require

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

BZIMAGE_PAYLOAD = bytes(range(256)) * 16


def build_bzimage(**fields: int) -> bytes:
    """A bzImage of two setup sectors and 4 KiB of payload; ``fields`` replace header fields by name."""
    layout = {
        "setup_sects": (0x1F1, "B", 1),
        "syssize": (0x1F4, "I", len(BZIMAGE_PAYLOAD) // 16),
        "boot_flag": (0x1FE, "H", 0xAA55),
        "jump": (0x200, "H", 0x66EB),
        "version": (0x206, "H", 0x20F),
        "loadflags": (0x211, "B", 1),
        "initrd_addr_max": (0x22C, "I", 0x7FFFFFFF),
        "kernel_alignment": (0x230, "I", 0x200000),
        "relocatable": (0x234, "B", 1),
        "xloadflags": (0x236, "H", 0x7F),
        "cmdline_size": (0x238, "I", 2047),
        "pref_address": (0x258, "Q", 0x1000000),
        "init_size": (0x260, "I", 0x800000),
    }
    setup = bytearray(1024)
    setup[0x202:0x206] = b"HdrS"
    for name, (offset, form, value) in layout.items():
        struct.pack_into(f"<{form}", setup, offset, fields.get(name, value))
    return bytes(setup) + BZIMAGE_PAYLOAD


def build_note(name: bytes, kind: int, description: bytes) -> bytes:
    """One ELF note, padded."""
    head = struct.pack("<III", len(name), len(description), kind)
    return head + name.ljust(-(-len(name) // 4) * 4, b"\0") + description.ljust(-(-len(description) // 4) * 4, b"\0")


def build_elf(
    segments: Sequence[tuple[int, bytes, int]] = ((0x1000000, b"\xf4" * 64, 4096),),
    notes: bytes = b"",
    **fields: int,
) -> bytes:
    """An ELF64 of these (physical address, bytes, memory size) segments; ``fields`` replace header fields by name."""
    headers = []
    body = b""
    count = len(segments) + bool(notes)
    start = 64 + 56 * count
    for address, data, memory_size in segments:
        headers.append(
            struct.pack("<IIQQQQQQ", 1, 7, start + len(body), address, address, len(data), memory_size, 4096)
        )
        body += data
    if notes:
        headers.append(struct.pack("<IIQQQQQQ", 4, 4, start + len(body), 0, 0, len(notes), len(notes), 4))
        body += notes
    ident = b"\x7fELF" + bytes([fields.get("elf_class", 2), fields.get("byte_order", 1), 1]) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        ident,
        fields.get("type", 2),
        fields.get("machine", 62),
        1,
        fields.get("entry", 0x1000000),
        fields.get("phoff", 64),
        0,
        0,
        64,
        fields.get("phentsize", 56),
        fields.get("phnum", count),
        0,
        0,
        0,
    )
    return header + b"".join(headers) + body


PVH_NOTE = build_note(b"GNU\0", 3, b"build-id") + build_note(b"Xen\0", 18, struct.pack("<I", 0x1000010))


@pytest.fixture(scope="session")
def bzimage() -> Callable[..., bytes]:
    """Builds a bzImage."""
    return build_bzimage


@pytest.fixture(scope="session")
def bzimage_payload() -> bytes:
    """What is loaded of that bzImage."""
    return BZIMAGE_PAYLOAD


@pytest.fixture(scope="session")
def elf() -> Callable[..., bytes]:
    """Builds an ELF64 kernel."""
    return build_elf


@pytest.fixture(scope="session")
def note() -> Callable[[bytes, int, bytes], bytes]:
    """Builds an ELF note."""
    return build_note


@pytest.fixture(scope="session")
def pvh_note() -> bytes:
    """Notes among which is a PVH entry at 0x1000010."""
    return PVH_NOTE


@pytest.fixture(scope="session")
def default_kernel() -> memoryview:
    """The kernel file of the built guest image."""
    require("image")
    return memoryview(find_image("default").kernel.read_bytes())
