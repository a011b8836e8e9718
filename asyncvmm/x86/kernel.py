"""Tells kernel files apart: bzImage, ELF64 vmlinux, or something that is neither, said in words."""

from __future__ import annotations

from asyncvmm.errors import KernelError
from asyncvmm.x86.bzimage import BzImage, is_bzimage, parse_bzimage
from asyncvmm.x86.elf import ElfKernel, check_elf_header, is_elf, parse_elf
from asyncvmm.x86.filetype import what_is


def inspect_kernel(image: bytes | memoryview) -> BzImage | ElfKernel:
    """The kernel in ``image``, the whole file (memory-mapped or read), every header field checked against it.

    The result's payload is a view of ``image``, not a copy. Raises KernelError.
    """
    if len(image) == 0:
        raise _not_a_kernel(image)
    view = memoryview(image).cast("B")
    if is_elf(view):
        return parse_elf(view)
    if is_bzimage(view):
        return parse_bzimage(view)
    raise _not_a_kernel(view)


def check_kernel_head(head: bytes | memoryview) -> None:
    """Refuse by a file's first bytes (4 KiB, or all of it) what is no kernel of ours. Raises KernelError."""
    view = memoryview(head).cast("B")
    if is_elf(view):
        check_elf_header(view)
    elif not is_bzimage(view):
        raise _not_a_kernel(view)


def _not_a_kernel(image: bytes | memoryview) -> KernelError:
    return KernelError("kernel", expected="a bzImage or an ELF vmlinux for x86-64", found=what_is(image))
