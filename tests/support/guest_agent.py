"""A shell in a guest that does what the host asks: lines in, their output out, over a named port of its console."""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream

from tests.support.byte_streams import read_exactly, read_until

PORT = "agent"
PATIENCE_S = 100

SCRIPT = r"""
port() { for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name 2>&-)" = $1 ] && echo /dev/${p##*/}; done; }
exec 3<>$(port agent)
while read -r line <&3; do
    eval "$line" >/tmp/said 2>&1
    echo "status=$?" >>/tmp/said
    { wc -c </tmp/said; cat /tmp/said; } >&3
done
"""
"""The workload: ``sh -c SCRIPT``. The lines it gets may use ``port NAME``, the device of a port."""


class Agent:
    """The host's side. ``run`` gives what a line printed; a line that fails is an AssertionError."""

    def __init__(self, port: ByteStream) -> None:
        self._port = port

    async def run(self, line: str) -> str:
        """Have a line of shell carried out, and wait for it."""
        output, _, status = (await self.attempt(line)).rpartition("status=")
        assert status == "0", f"{line}: status {status}, {output}"
        return output

    async def attempt(self, line: str) -> str:
        """As ``run``, for what may fail: ``status=`` and the exit status come behind what it printed."""
        with anyio.fail_after(PATIENCE_S):
            await self._port.send(line.encode() + b"\n")
            size = int(await read_until(self._port, b"\n"))
            return (await read_exactly(self._port, size)).decode().removesuffix("\n")
