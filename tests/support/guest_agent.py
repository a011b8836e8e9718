"""A shell in a guest that does what the host asks: lines in, their output out, over a named port of its console."""

from __future__ import annotations

import anyio
from anyio.abc import ByteStream

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
        self._data = b""

    async def run(self, line: str) -> str:
        """Have a line of shell carried out, and wait for it."""
        with anyio.fail_after(PATIENCE_S):
            await self._port.send(line.encode() + b"\n")
            size = int(await self._until_newline())
            while len(self._data) < size:
                self._data += await self._port.receive()
        said, self._data = self._data[:size].decode(), self._data[size:]
        output, _, status = said.removesuffix("\n").rpartition("status=")
        assert status == "0", f"{line}: status {status}, {output}"
        return output

    async def _until_newline(self) -> bytes:
        while b"\n" not in self._data:
            self._data += await self._port.receive()
        line, _, self._data = self._data.partition(b"\n")
        return line
