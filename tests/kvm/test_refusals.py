"""What cannot be booted is refused with a typed error before anything is started, and nothing is left of it."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from asyncvmm.config import MAX_MEMORY_MIB, MAX_VCPUS
from asyncvmm.errors import (
    CmdlineError,
    ConfigError,
    InitrdError,
    KernelError,
    KvmUnavailable,
    MemorySizeError,
    VcpuCountError,
)
from asyncvmm.machine.assets import host_memory
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.machine.kvm.system import KvmSystem
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from tests.kvm.conftest import Resources

pytestmark = pytest.mark.anyio

Refuse = Callable[[BootPlan, type[ConfigError]], Awaitable[str]]


def elf(address: int, size: int = 4096, memory_size: int = 4096, machine: int = 62, data: bytes = bytes(4096)) -> bytes:
    """An ELF64 with one segment."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, address, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 7, 120, address, address, size, memory_size, 4096) + data


@pytest.fixture
def plan(guest: Callable[[str], Path]) -> BootPlan:
    """A plan that would boot."""
    return BootPlan(name="kvmtest", memory_mib=67, vcpus=1, kernel=guest("spin"), initrd=None)


@pytest.fixture
async def refused(resources: Callable[[], Resources], nothing: Resources) -> Refuse:
    """Starts a plan that must be refused with ``error``, naming ``expected`` and ``found``."""

    async def refuse(plan: BootPlan, error: type[ConfigError]) -> str:
        fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        timeline = Timeline()
        machine = KvmMachine(plan, timeline, lambda effects: pytest.fail(f"effects: {effects}"))
        with pytest.raises(error) as caught:
            await machine.start()
        assert resources() == nothing
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() <= threads + 1  # the worker thread that reads files stays for the next use
        assert "vm_create" not in timeline.durations()
        assert caught.value.expected is not None
        assert caught.value.found is not None
        assert "\n" not in str(caught.value)
        assert machine.exits() is None
        return str(caught.value)

    return refuse


async def _warm_up(plan: BootPlan) -> None:
    """Have anyio's worker thread and its descriptors there before they are counted."""
    machine = KvmMachine(plan, Timeline(), lambda effects: None)
    await machine.start()
    await machine.stop()


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("nothing", b""),
        ("a text file", b"#!/bin/sh\necho this is not a kernel\n"),
        ("random bytes", bytes(range(256)) * 64),
        ("the head of a bzImage", bytes(0x1F1) + b"\x01".ljust(0x11, b"\0") + b"HdrS"),
        ("a truncated ELF", elf(0x100000)[:100]),
        ("an ELF whose segment the file does not hold", elf(0x100000)[:2000]),
        ("an ELF for another machine", elf(0x100000, machine=183)),
        ("an ELF below 1 MiB, over our tables", elf(0x9000)),
        ("an ELF in the 32-bit hole", elf(0xD0000000)),
        ("an ELF beyond all memory", elf(0xFFFF_FFFF_FFFF_F000)),
    ],
)
async def test_what_is_not_a_kernel_is_refused(
    plan: BootPlan, refused: Refuse, tmp_path: Path, what: str, content: bytes
) -> None:
    await _warm_up(plan)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(content)
    await refused(attrs.evolve(plan, kernel=kernel), KernelError)


async def test_a_kernel_that_leaves_the_guests_memory_is_refused(
    plan: BootPlan, refused: Refuse, tmp_path: Path
) -> None:
    await _warm_up(plan)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf(0x100000, memory_size=67 << 20))
    await refused(attrs.evolve(plan, kernel=kernel), MemorySizeError)


async def test_kernels_that_are_no_files_are_refused(plan: BootPlan, refused: Refuse, tmp_path: Path) -> None:
    await _warm_up(plan)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for kernel in (tmp_path / "missing", tmp_path, fifo, Path("/dev/zero"), Path("with\0nul"), plan.kernel / "below"):
        message = await refused(attrs.evolve(plan, kernel=kernel), KernelError)
        assert "kernel" in message


@pytest.mark.requires("unprivileged")
async def test_an_unreadable_kernel_is_refused(plan: BootPlan, refused: Refuse, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.touch(0o000)
    await refused(attrs.evolve(plan, kernel=kernel), KernelError)


async def test_an_initrd_that_is_no_file_or_does_not_fit_is_refused(
    plan: BootPlan, refused: Refuse, tmp_path: Path
) -> None:
    await _warm_up(plan)
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 67 << 20)
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 1 << 40)
    for initrd in (tmp_path / "missing", tmp_path, large, huge):
        await refused(attrs.evolve(plan, initrd=initrd), InitrdError)


async def test_an_appended_archive_that_does_not_fit_is_refused(plan: BootPlan, refused: Refuse) -> None:
    await _warm_up(plan)
    await refused(attrs.evolve(plan, memory_mib=4, appended=bytes(4 << 20)), InitrdError)


async def test_memory_of_nothing_and_of_more_than_the_host_has_is_refused(plan: BootPlan, refused: Refuse) -> None:
    await _warm_up(plan)
    for memory_mib in (0, 1, (host_memory() >> 20) + 1, MAX_MEMORY_MIB, 1 << 60):
        await refused(attrs.evolve(plan, memory_mib=memory_mib), MemorySizeError)


async def test_no_vcpus_and_more_than_can_be_named_are_refused(plan: BootPlan, refused: Refuse) -> None:
    await _warm_up(plan)
    for vcpus in (0, -1, MAX_VCPUS + 1, 1 << 40):
        await refused(attrs.evolve(plan, vcpus=vcpus), VcpuCountError)


async def test_a_command_line_too_long_or_with_a_nul_is_refused(plan: BootPlan, refused: Refuse) -> None:
    await _warm_up(plan)
    for cmdline in ("x" * 2048, "\u00e9" * 1024, "a\0b"):
        await refused(attrs.evolve(plan, cmdline=cmdline), CmdlineError)


def test_a_missing_kvm_device_says_what_to_mend(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable, match="no such file"):
        KvmSystem.open(tmp_path / "kvm")


def test_a_device_that_is_not_kvm_is_told_apart() -> None:
    with pytest.raises(KvmUnavailable):
        KvmSystem.open(Path("/dev/null"))


def test_a_directory_is_no_kvm_device(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailable):
        KvmSystem.open(tmp_path)
