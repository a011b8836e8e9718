"""A real Linux on QEMU behind a real passt: out to the host's addresses, in by a published port, and no further."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import NetConfig, Publish
from tests.support.holdings import children

pytestmark = [pytest.mark.anyio, pytest.mark.requires("qemu", "image", "passt")]

PATIENCE_S = 60
BULK = 300_000
WORKLOAD = """
out=$( (sleep 1) | nc -w 5 OUTSIDE OUT_PORT | wc -c)
loopback=$( (sleep 1) | nc -w 2 10.0.2.2 LOOPBACK_PORT | wc -c)
echo "out=$out loopback=$loopback end" >/index.html
httpd -f -p 80 -h /
"""


def own_address() -> str | None:
    """An address of this host's that is not its loopback."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as anything:
        try:
            anything.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(anything.getsockname()[0])


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One boot: both loops see the helper in tests/unit/net."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def free_port() -> int:
    with closing(socket.socket()) as anybody:
        anybody.bind(("127.0.0.1", 0))
        port = anybody.getsockname()[1]
    return int(port)


async def give(stream: SocketStream) -> None:
    async with stream:
        await stream.send(b"x" * BULK)


async def fetch(port: int) -> bytes:
    answer = b""
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(b"GET /index.html HTTP/1.0\r\n\r\n")
        while b"end\n" not in answer:
            answer += await stream.receive()
    return answer


async def test_the_guest_reaches_out_and_is_reached_and_the_hosts_loopback_is_out_of_reach(free_port: int) -> None:
    outside = own_address()
    publish = [Publish(host_port=free_port, guest_port=80)]
    async with (
        await anyio.create_tcp_listener(local_host=outside or "127.0.0.1") as server,
        await anyio.create_tcp_listener(local_host="127.0.0.1") as loopback,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(server.serve, give)
        tasks.start_soon(loopback.serve, give)
        out_port, loopback_port = (str(each.extra(SocketAttribute.local_port)) for each in (server, loopback))
        script = WORKLOAD.replace("OUTSIDE", outside or "127.0.0.1").replace("OUT_PORT", out_port)
        script = script.replace("LOOPBACK_PORT", loopback_port)
        config = VMConfig(accel="qemu", workload=["/bin/sh", "-c", script], net=NetConfig(publish=publish))
        with anyio.fail_after(PATIENCE_S):
            async with VM(config) as vm:
                await vm.boot()
                await vm.events.listener
                answer = await fetch(free_port)
        tasks.cancel_scope.cancel()
    assert b" loopback=0 end\n" in answer
    if outside is not None:
        assert f"out={BULK} ".encode() in answer
    assert not children(os.getpid())
