"""The distribution's kernel on the KVM machine with every device at once: one boot, and many looks at it."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs
import pytest
from anyio.abc import ByteReceiveStream

from asyncvmm import VM, VMConfig
from asyncvmm.device_config import BalloonConfig, ConsoleConfig, DriveConfig, NetConfig, Publish
from asyncvmm.devices.virtio.registers import (
    INTERRUPT_ACK,
    QUEUE_NOTIFY,
)
from asyncvmm.x86.layout import mmio_device
from tests.support.guest_agent import PATIENCE_S, PORT, SCRIPT, Agent
from tests.support.guest_root import PAGE, guest_root

# Stalls: one emulated CPU may wait long for a busy host's while the other, which would be the excuse, does not.
pytestmark = [pytest.mark.anyio, pytest.mark.stalls, pytest.mark.requires("passt", "e2fsprogs")]

MIB = 1 << 20
HTTP_PORT = 80
PIECE_MIB, BULK_MIB = 4, 100
REQUEST = b"GET /page HTTP/1.0\r\n\r\n"
FILE_BYTES = 2 * MIB


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The boot is shared, so is the loop."""
    return "asyncio", {"use_uvloop": True}


@attrs.frozen
class Guest:
    """A booted guest that does what it is told. ``lines``: its events."""

    vm: VM
    agent: Agent
    root: Path
    http: int
    lines: Path

    def exits_at(self, *registers: int) -> dict[str, int]:
        """Exits so far at these registers of any virtio device."""
        assert self.vm.exits is not None
        addresses = {mmio_device(index).address + register for index in range(8) for register in registers}
        counts = {name: entry.count for name, entry in self.vm.exits.by_address.items()}
        return {
            name: count for name, count in counts.items() if name.startswith("mmio") and _address(name) in addresses
        }

    async def metrics(self, group: str) -> dict[str, Any]:
        """What was counted since this was last asked, as the ``metrics`` line has it."""
        seen = len(self.metrics_lines())
        self.vm.metrics.flush()
        with anyio.fail_after(PATIENCE_S):
            while len(lines := self.metrics_lines()) == seen:  # noqa: ASYNC110 (nobody tells)
                await anyio.sleep(0.01)
        found: dict[str, Any] = json.loads(lines[-1])[group]
        return found

    def metrics_lines(self) -> list[str]:
        """Whole ones."""
        whole, _, _ = self.lines.read_text().rpartition("\n")
        return [line for line in whole.split("\n") if '"event":"metrics"' in line]


def _address(name: str) -> int:
    return int(name.split()[-1], 16)


@pytest.fixture(scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    directory = tmp_path_factory.mktemp("devices")
    http, lines = free_port(), directory / "events.jsonl"
    root = guest_root(directory)
    config = VMConfig(
        accel="kvm",
        memory_mib=256,
        drives=[DriveConfig(path=root, root=True, id="root")],
        net=NetConfig(publish=[Publish(host_port=http, guest_port=HTTP_PORT)]),
        balloon=BalloonConfig(free_page_reporting=False),
        vsock=True,
        rng=True,
        virtio_console=ConsoleConfig(ports=(PORT, "bulk")),
        workload=("sh", "-c", SCRIPT),
    )
    async with VM(config) as vm:
        vm.stream_to(lines)
        with anyio.fail_after(PATIENCE_S):
            await vm.boot()
        yield Guest(vm, Agent(vm.ports[PORT]), root, http, lines)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


async def everything(stream: ByteReceiveStream) -> bytes:
    """What comes until the other side ends."""
    data = bytearray()
    with anyio.fail_after(PATIENCE_S):
        async for chunk in stream:
            data += chunk
    return bytes(data)


async def test_the_root_is_the_ext4_image_and_its_driver_takes_no_exits(guest: Guest) -> None:
    assert "/dev/vda / ext4 rw" in await guest.agent.run("grep ' / ' /proc/mounts")
    before, _ = guest.exits_at(QUEUE_NOTIFY, INTERRUPT_ACK), await guest.metrics("block_root")
    await guest.agent.run(
        "dd if=/dev/urandom of=/some bs=64k count=16; sync; dd if=/dev/vda of=/dev/null bs=64k count=64"
    )
    counted = await guest.metrics("block_root")
    assert counted["write_bytes"] >= MIB
    assert counted["read_count"] > 0
    assert counted["queue_event_count"] > 0
    assert guest.exits_at(QUEUE_NOTIFY, INTERRUPT_ACK) == before


async def test_a_web_server_in_the_guest_is_reached_through_the_user_network(guest: Guest) -> None:
    await guest.agent.run(f"httpd -h /www -p {HTTP_PORT}")
    async with await anyio.connect_tcp("127.0.0.1", guest.http) as stream:
        await stream.send(REQUEST)
        head, _, body = (await everything(stream)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == PAGE


async def test_a_web_server_in_the_guest_is_reached_through_vsock(guest: Guest) -> None:
    await guest.agent.run(f"vsock_serve {HTTP_PORT} httpd -i -h /www >/tmp/serve 2>&1")
    async with await guest.vm.vsock.connect(HTTP_PORT) as stream:
        await stream.send(REQUEST)
        head, _, body = (await everything(stream)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == PAGE


async def test_the_balloon_takes_100_mib_and_gives_them_back_and_its_metrics_count_that(guest: Guest) -> None:
    await guest.agent.run(use(110))
    await guest.metrics("balloon")
    resident, balloon = resident_bytes(), guest.vm.balloon
    with anyio.fail_after(PATIENCE_S):
        assert await balloon.set(100) == 100
        low = await balloon.stats()
        assert resident - resident_bytes() > 90 * MIB
        assert await balloon.set(0) == 0
        high = await balloon.stats()
    assert (low.target_mib, low.actual_mib, high.actual_mib) == (100, 100, 0)
    assert low.free_memory is not None
    assert high.free_memory is not None
    assert high.free_memory - low.free_memory > 90 * MIB
    counted = {name: value for name, value in (await guest.metrics("balloon")).items() if value}
    assert counted == {"inflate_count": 100, "deflate_count": 100, "stats_updates_count": 2}, "256 pages at a time"
    await guest.agent.run(use(16))


def use(mib: int) -> str:
    """A command that writes to so much memory, and frees it: untouched pages cost the host nothing."""
    return f"dd if=/dev/zero of=/dev/null bs={mib}M count=1"


def resident_bytes() -> int:
    """Of this process, the guest's memory included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_the_guests_hwrng_gives_bytes_of_ours(guest: Guest) -> None:
    await guest.metrics("entropy")
    assert "virtio_rng" in await guest.agent.run("cat /sys/class/misc/hw_random/rng_current")
    digests = await guest.agent.run("for i in 1 2; do head -c 4096 /dev/hwrng | sha256sum; done")
    assert len(set(digests.split("\n")[:2])) == 2
    assert (await guest.metrics("entropy"))["entropy_bytes"] >= 4096


async def test_100_mib_go_through_the_console_whole(guest: Guest) -> None:
    port, piece = guest.vm.ports["bulk"], os.urandom(PIECE_MIB * MIB)
    digest = await anyio.to_thread.run_sync(lambda: hashlib.sha256(piece).hexdigest())
    await guest.agent.run(f"head -c {len(piece)} <$(port bulk) >/tmp/piece 2>&- & job=$!")
    with anyio.fail_after(PATIENCE_S):
        await port.send(piece)
    assert digest in await guest.agent.run("wait $job; sha256sum /tmp/piece")
    await guest.agent.run(
        f"for i in $(seq {BULK_MIB // PIECE_MIB}); do cat /tmp/piece; done >$(port bulk) 2>&- & job=$!"
    )
    with anyio.fail_after(PATIENCE_S):
        for _ in range(BULK_MIB // PIECE_MIB):
            await expect(port, piece)
    await guest.agent.run("wait $job; rm /tmp/piece")


async def expect(port: ByteReceiveStream, wanted: bytes) -> None:
    """These bytes and no others come next."""
    place = 0
    while place < len(wanted):
        data = await port.receive(len(wanted) - place)
        assert data == wanted[place : place + len(data)], f"at byte {place}"
        place += len(data)


async def test_hvc0_is_the_port_named_console(guest: Guest) -> None:
    await guest.agent.run("stty raw -echo </dev/hvc0; echo hello from hvc0 >/dev/hvc0")
    said = b""
    with anyio.fail_after(PATIENCE_S):
        while not said.endswith(b"\n"):
            said += await guest.vm.ports["console"].receive()
    assert said.strip() == b"hello from hvc0"


async def test_what_the_guest_wrote_to_its_root_is_in_the_image_after_power_off(guest: Guest) -> None:
    """The last one: it ends the guest."""
    written = await guest.agent.run(f"head -c {FILE_BYTES} /dev/urandom >/written; sync; sha256sum /written")
    await guest.vm.shutdown(PATIENCE_S)
    with anyio.fail_after(PATIENCE_S):
        assert await guest.vm.events.stopped == "shutdown"
    assert await anyio.to_thread.run_sync(checksum_in, guest.root, "/written") == written.split()[0]


def checksum_in(image: Path, path: str) -> str:
    """The sha256 of a file in an ext4 image that must be whole."""
    run("e2fsck", "-fp", str(image))  # -p replays the journal of a system that was powered off while mounted
    copy = image.with_name("copy")
    run("debugfs", "-R", f"dump {path} {copy}", str(image))
    assert copy.stat().st_size == FILE_BYTES
    return hashlib.sha256(copy.read_bytes()).hexdigest()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done
