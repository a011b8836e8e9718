"""A host's end and a guest's kernel, joined by the real device and transport."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from asyncvmm.vsock.host import VsockHost
from tests.support.vsock_guest import GuestKernel

ECHO, OTHER = 7, 9


@pytest.fixture
async def kernel(anyio_backend: object) -> AsyncIterator[GuestKernel]:
    kernel = GuestKernel(echo=frozenset({ECHO}), others=frozenset({OTHER}))
    async with kernel.running():
        yield kernel
    assert not kernel.driver.needs_reset


@pytest.fixture
async def host(kernel: GuestKernel) -> AsyncIterator[VsockHost]:
    host = VsockHost(kernel.device)
    yield host
    host.close()
