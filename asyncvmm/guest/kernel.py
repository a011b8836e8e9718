"""Telling a kernel from any other file, and its release (``uname -r``).

Sources: Documentation/x86/boot.rst in the Linux tree ("HdrS" at 0x202, kernel_version at 0x20e, relative to 0x200);
the ELF-64 object file format. The loaders check far more when they boot it.
"""

from __future__ import annotations

from pathlib import Path

from asyncvmm.errors import KernelError

MAX_KERNEL = 1 << 30
"""Most bytes of a kernel file."""

_RELEASE_MAX = 256
_EM_X86_64 = 62


def read_kernel(path: Path) -> bytes:
    """The bytes of a bzImage or an x86-64 vmlinux. Raises KernelError for anything else."""
    try:
        with path.open("rb") as stream:
            kernel = stream.read(MAX_KERNEL + 1)
    except OSError as error:
        raise KernelError(f"kernel {path}", expected="a readable file", found=error.strerror) from error
    if len(kernel) > MAX_KERNEL:
        raise KernelError(f"kernel {path}", expected=f"at most {MAX_KERNEL} bytes", found="more")
    if not (is_bzimage(kernel) or is_vmlinux(kernel)):
        raise KernelError(f"kernel {path}", expected="a bzImage or an x86-64 ELF vmlinux", found=repr(kernel[:8]))
    return kernel


def is_bzimage(kernel: bytes) -> bool:
    """Whether these bytes carry the boot protocol's header."""
    return kernel[0x202:0x206] == b"HdrS"


def is_vmlinux(kernel: bytes) -> bool:
    """Whether these bytes begin as a 64-bit little-endian ELF file for x86-64."""
    return kernel[:6] == b"\x7fELF\x02\x01" and int.from_bytes(kernel[18:20], "little") == _EM_X86_64


def kernel_release(kernel: bytes) -> str | None:
    """The release a bzImage names in its header; None if it names none."""
    if not is_bzimage(kernel):
        return None
    offset = int.from_bytes(kernel[0x20E:0x210], "little")
    text = kernel[0x200 + offset :][:_RELEASE_MAX] if offset else b""
    release = text.split(b"\0", 1)[0].split(b" ", 1)[0]
    return release.decode("ascii", "replace") or None
