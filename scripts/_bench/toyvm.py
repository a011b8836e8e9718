"""Small guests by the library's front door: a VM on KVM, booting in the background or booted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from asyncvmm.config import VMConfig
from asyncvmm.errors import GuestError
from asyncvmm.vm import VM


@asynccontextmanager
async def toy_vm(guest: Path, memory_mib: int, *, until_ready: bool, serial_lines: bool = False) -> AsyncIterator[VM]:
    """A VM that runs ``guest``; with ``until_ready`` the block begins when it has said READY, else before it starts."""
    config = VMConfig(kernel=guest, cmdline="", memory_mib=memory_mib, accel="kvm", serial_lines=serial_lines)
    async with VM(config) as vm:
        boot = asyncio.ensure_future(vm.boot())
        try:
            if until_ready:
                await boot
            yield vm
        finally:
            boot.cancel()
            with suppress(asyncio.CancelledError, GuestError):
                await boot
