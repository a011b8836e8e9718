"""Tells kernel files apart: bzImage, ELF64 vmlinux, or something that is neither, said in words."""

from __future__ import annotations

from asyncvmm.errors import KernelError
from asyncvmm.x86.bzimage import BzImage, is_bzimage, parse_bzimage
from asyncvmm.x86.elf import ElfKernel, is_elf, parse_elf
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


def _not_a_kernel(image: bytes | memoryview) -> KernelError:
    return KernelError("kernel", expected="a bzImage or an ELF vmlinux for x86-64", found=what_is(image))
