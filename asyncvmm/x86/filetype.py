"""Says in words what a file is that is not a kernel, so that the error helps. Facts: file(1)'s magic numbers."""

from __future__ import annotations

import struct

TEXT_SAMPLE = 512

_MAGIC = (
    (0x38, b"ARM\x64", "an arm64 Image"),
    (0x38, b"RSC\x05", "a RISC-V Image"),
    (0, b"\x1f\x8b", "a gzip stream"),
    (0, b"\xfd7zXZ\x00", "an xz stream"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd stream"),
    (0, b"\x02\x21\x4c\x18", "an LZ4 stream"),
    (0, b"\x04\x22\x4d\x18", "an LZ4 stream"),
    (0, b"BZh", "a bzip2 stream"),
    (0, b"#!", "a script"),
    (0, b"0707", "a cpio archive"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"!<arch>\n", "an ar archive or Debian package"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0x438, b"\x53\xef", "an ext file system"),
    (0, b"MZ", "a DOS or EFI program without a Linux setup header"),
    (0x1FE, b"\x55\xaa", "a boot sector without a Linux setup header"),
)

_MACHINES = {
    2: "SPARC",
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "ppc64",
    22: "s390",
    40: "ARM",
    62: "x86-64",
    183: "aarch64",
    243: "RISC-V",
    258: "LoongArch",
}
_TYPES = {0: "no type", 1: "an object file", 2: "an executable", 3: "a shared object", 4: "a core dump"}


def what_is(image: bytes | memoryview) -> str:
    """A few words for what the bytes look like: ``an empty file``, ``a gzip stream`` …, never empty."""
    if len(image) == 0:
        return "an empty file"
    if bytes(image[:4]) == b"\x7fELF":
        return _elf(image)
    for offset, magic, words in _MAGIC:
        if bytes(image[offset : offset + len(magic)]) == magic:
            return words
    sample = bytes(image[:TEXT_SAMPLE])
    if not any(sample):
        return "a file that starts with zeros"
    if _is_text(sample):
        return "a text file"
    return f"a file of {len(image)} bytes that starts with {sample[:8].hex(' ')}"


def machine_name(machine: int) -> str:
    """The name of an ELF e_machine value."""
    return _MACHINES.get(machine, f"machine {machine}")


def elf_type_name(elf_type: int) -> str:
    """The name of an ELF e_type value."""
    return _TYPES.get(elf_type, f"type {elf_type:#x}")


def _elf(image: bytes | memoryview) -> str:
    if len(image) < 20:
        return f"a truncated ELF of {len(image)} bytes"
    order = ">" if image[5] == 2 else "<"
    machine: int = struct.unpack_from(f"{order}H", image, 18)[0]
    bits = {1: "a 32-bit ELF", 2: "an ELF"}.get(image[4], "an ELF of unknown class")
    return f"{bits} for {machine_name(machine)}"


def _is_text(sample: bytes) -> bool:
    try:
        text = sample.decode()
    except UnicodeDecodeError as error:
        # A sample may end inside a character.
        if error.start < len(sample) - 3 or len(sample) < TEXT_SAMPLE:
            return False
        text = sample[: error.start].decode()
    return all(character.isprintable() or character in "\t\n\r\f\b\x1b" for character in text)
