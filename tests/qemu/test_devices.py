"""Linux on the QEMU machine with every device at once: one boot for each kind of machine, and many looks at it."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from anyio.abc import ByteStream

from asyncvmm.balloon import Balloon
from asyncvmm.device_config import (
    BalloonConfig,
    ConsoleConfig,
    DeviceConfig,
    DriveConfig,
    NetConfig,
    RngConfig,
    VsockConfig,
)
from asyncvmm.errors import VsockRefused
from asyncvmm.guest import cpio
from asyncvmm.guest.archive import workload_archive
from asyncvmm.machine.base import BootPlan, DriveResource, Resources
from asyncvmm.machine.qemu.binary import find_qemu
from asyncvmm.machine.qemu.machine import QemuMachine
from asyncvmm.vsock.stream import VsockAttribute
from tests.support.byte_streams import read_exactly, read_until
from tests.support.guest_agent import PORT, SCRIPT, Agent
from tests.support.holdings import children
from tests.support.qemu_machine import PATIENCE_S, Witness, default_image, running, tsc_khz
from tests.support.requirements import require

pytestmark = pytest.mark.anyio

GUESTS = Path(__file__).parents[1] / "guests"
MIB = 1 << 20
MEMORY_MIB = 256
MAC = "02:00:00:00:00:2a"
GUEST_IP, HOST_IP, HOST_MAC = "10.9.0.2", "10.9.0.1", bytes.fromhex("020000000001")
DRIVES = (
    DriveConfig(path="first", id="a.first", read_only=True),
    DriveConfig(path="second", id="b-second"),
    DriveConfig(path="third", id="c_third", cache="none"),
    DriveConfig(path="fourth", id="d", discard=False, cache="unsafe"),
)


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """The boots are shared, so is the loop; the other one sees the machine in test_machine.py and test_ports.py."""
    return "asyncio", {"use_uvloop": True}


@attrs.define
class Guest:
    """A booted Linux with an agent, and the host's sides of its devices."""

    machine: QemuMachine
    witness: Witness
    files: list[Path]
    wire: socket.socket
    uds_path: Path
    pid: int

    async def run(self, command: str) -> str:
        """The output of a shell command in the guest, its exit status last."""
        return await Agent(self.machine.ports[PORT]).attempt(command)

    def resident(self) -> int:
        """Bytes of host memory behind the guest's: what is resident of the mapping that has its size."""
        mappings = Path(f"/proc/{self.pid}/smaps").read_text()
        (rss,) = re.findall(rf"^Size: +{MEMORY_MIB << 10} kB\n(?:.*\n){{2}}Rss: +(\d+) kB$", mappings, re.MULTILINE)
        return int(rss) << 10


def make_drives(directory: Path) -> tuple[DriveResource, ...]:
    resources = []
    for index, drive in enumerate(DRIVES):
        path = directory / f"{index},{drive.path}"  # a comma would be an option of its own, written in words
        path.write_bytes(f"drive {index}\n".encode().ljust(8 * MIB, b"\1"))
        resources.append(DriveResource(drive, path))
    return tuple(resources)


def vsock_program(directory: Path) -> bytes:
    """guests/vsock.c, as an archive that puts it into the guest's /bin."""
    require("musl-gcc")
    target = directory / "vsock"
    subprocess.run(["musl-gcc", "-static", "-Os", "-s", "-o", target, GUESTS / "vsock.c"], check=True, timeout=60)
    return cpio.write([cpio.file("bin/vsock", target.read_bytes(), 0o755)])


def plan_of(directory: Path, machine_type: str, net_fd: int) -> BootPlan:
    image = default_image()
    if machine_type == "q35" and "virtio_pci" not in (image.directory / "manifest.json").read_text():
        pytest.fail("the image has no virtio_pci: build it anew")
    return BootPlan(
        name="devices",
        memory_mib=MEMORY_MIB,
        vcpus=1,
        kernel=image.kernel,
        initrd=image.initrd,
        appended=workload_archive(("sh", "-c", SCRIPT), ()) + vsock_program(directory),
        cmdline="console=ttyS0 8250.nr_uarts=1 panic=-1 quiet",
        tsc_khz=tsc_khz() if machine_type == "microvm" else None,
        devices=DeviceConfig(
            drives=DRIVES,
            net=NetConfig(),
            balloon=BalloonConfig(mib=16, free_page_hinting=True),
            rng=RngConfig(),
            vsock=VsockConfig(cid=42, uds_path=directory / "v.sock"),
            console=ConsoleConfig(ports=(PORT, "bulk.1")),
        ),
        resources=Resources(drives=make_drives(directory), net_fd=net_fd, mac=MAC),
    )


@contextmanager
def nothing_left_mapped() -> Iterator[None]:
    """The guest's memory, in which the socket device worked, is let go of."""
    yield
    assert "guest-memory" not in Path("/proc/self/maps").read_text()


@pytest.fixture(scope="module", params=["microvm", "q35"])
async def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    require("qemu")
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    directory = tmp_path_factory.mktemp("devices")
    plan = plan_of(directory, request.param, theirs.fileno())
    with ours, theirs, nothing_left_mapped():
        before = children(os.getpid())
        async with running(plan, find_qemu()) as (machine, witness):
            theirs.close()
            await witness.until_said("control", b"\nREADY\n")
            (pid,) = children(os.getpid()) - before
            yield Guest(
                machine, witness, [drive.path for drive in plan.resources.drives], ours, directory / "v.sock", pid
            )


async def test_drive_i_is_the_ith_disk_with_its_id_as_serial_number(guest: Guest) -> None:
    for index, (name, drive) in enumerate(zip(("vda", "vdb", "vdc", "vdd"), DRIVES, strict=True)):
        found = await guest.run(f"cat /sys/block/{name}/serial; echo; cat /sys/block/{name}/ro; head -n1 /dev/{name}")
        assert found.split("\n") == [drive.id, str(int(drive.read_only)), f"drive {index}", "status=0"]


async def test_what_the_guest_writes_is_in_the_file_once_it_has_been_flushed(guest: Guest) -> None:
    for name, file in (("vdb", guest.files[1]), ("vdc", guest.files[2])):
        command = (
            f"dd if=/dev/urandom bs=1M count=4 of=/dev/{name} conv=fsync 2>&-; head -c 4194304 /dev/{name} | md5sum"
        )
        found = await guest.run(command)
        assert found.split()[0] == hashlib.md5(file.read_bytes()[: 4 * MIB]).hexdigest()


async def test_a_read_only_drive_takes_no_writes(guest: Guest) -> None:
    before = guest.files[0].read_bytes()
    assert not (await guest.run("echo damage > /dev/vda && sync")).endswith("status=0")
    assert guest.files[0].read_bytes() == before


async def test_a_discard_makes_a_hole_unless_the_drive_refuses_it(guest: Guest) -> None:
    before = [os.stat(file).st_blocks for file in guest.files]
    assert (await guest.run("blkdiscard -o 4194304 -l 4194304 /dev/vdb")).endswith("status=0")
    assert not (await guest.run("blkdiscard -o 4194304 -l 4194304 /dev/vdd")).endswith("status=0")
    after = [os.stat(file).st_blocks for file in guest.files]
    assert before[1] - after[1] == 4 * MIB // 512
    assert before[3] == after[3]


async def test_frames_pass_both_ways_and_bear_the_cards_address(guest: Guest) -> None:
    await guest.run(f"ip addr add {GUEST_IP}/24 dev eth0; ip link set eth0 up")
    reply: list[str] = []

    async def ask() -> None:
        reply.append(await guest.run(f"arping -c 1 -w 20 -I eth0 {HOST_IP}"))

    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            frame = await frame_that(guest.wire, lambda frame: frame[12:14] == b"\x08\x06" and frame[38:42] == HOST)
            assert frame[6:12] == bytes.fromhex(MAC.replace(":", ""))
            await send_frame(guest.wire, answer_to(frame))
    assert "Received 1 response" in reply[0]


HOST = socket.inet_aton(HOST_IP)


def answer_to(request: bytes) -> bytes:
    """The ARP reply (RFC 826) to an ARP request for us."""
    sender = request[22:32]
    return request[6:12] + HOST_MAC + request[12:20] + b"\x00\x02" + HOST_MAC + HOST + sender


async def frame_that(wire: socket.socket, fits: Callable[[bytes], bool]) -> bytes:
    data = b""
    while True:
        await anyio.wait_readable(wire)
        data += wire.recv(65536)
        while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack(">I", data[:4])[0]):
            frame, data = data[4 : 4 + size], data[4 + size :]
            if fits(frame):
                return frame


async def send_frame(wire: socket.socket, frame: bytes) -> None:
    await anyio.wait_writable(wire)
    wire.sendall(struct.pack(">I", len(frame)) + frame)


async def test_the_balloon_takes_memory_from_the_guest_and_gives_it_back(guest: Guest) -> None:
    assert guest.machine.balloon is not None
    balloon = Balloon(lambda: guest.machine.balloon, MEMORY_MIB)
    with anyio.fail_after(PATIENCE_S):
        assert (await balloon.stats()).actual_mib == 16, "as configured"
        await guest.run("dd if=/dev/zero of=/tmp/fill bs=1M count=120; rm /tmp/fill")
        resident = guest.resident()
        assert await balloon.set(116) == 116
        low = await balloon.stats()
        assert guest.resident() < resident - 60 * MIB
        assert await balloon.set(0) == 0
        high = await balloon.stats()
    assert (low.target_mib, low.actual_mib, high.actual_mib) == (116, 116, 0)
    assert low.free_memory is not None
    assert high.free_memory is not None
    assert high.free_memory > low.free_memory + 90 * MIB
    assert (await guest.run("dd if=/dev/zero of=/dev/null bs=120M count=1")).endswith("status=0"), "it is usable again"


async def test_free_pages_come_back_to_the_host_by_themselves(guest: Guest) -> None:
    await guest.run("dd if=/dev/zero of=/tmp/fill bs=1M count=64")
    resident = guest.resident()
    await guest.run("rm /tmp/fill")
    with anyio.fail_after(PATIENCE_S):
        while guest.resident() > resident - 32 * MIB:  # they come as whole blocks of 2 MiB
            await guest.run("sleep 0.1")


async def test_the_guests_hwrng_gives_bytes(guest: Guest) -> None:
    assert (await guest.run("cat /sys/class/misc/hw_random/rng_current")).startswith("virtio_rng")
    assert (await guest.run("head -c 4096 /dev/hwrng | sort -u | wc -c")).split()[0] != "0"


async def test_bulk_goes_through_a_port_whole_in_both_directions(guest: Guest) -> None:
    port = guest.machine.ports["bulk.1"]
    data = os.urandom(1 << 16) * 128
    digest = hashlib.md5(data).hexdigest()
    with anyio.fail_after(PATIENCE_S):
        await guest.run(f"head -c {len(data)} $(port bulk.1) > /tmp/bulk & true")
        await port.send(data)
        assert (await guest.run("wait $!; md5sum < /tmp/bulk")).startswith(digest)
        await guest.run("cat /tmp/bulk > $(port bulk.1) & true")
        assert hashlib.md5(await read_exactly(port, len(data))).hexdigest() == digest
        await guest.run("wait $!; rm /tmp/bulk")


async def test_hvc0_is_the_port_named_console(guest: Guest) -> None:
    port = guest.machine.ports["console"]
    await guest.run("stty raw -echo < /dev/hvc0; echo hello from hvc0 > /dev/hvc0")
    with anyio.fail_after(PATIENCE_S):
        assert (await read_until(port, b"\n")).strip() == b"hello from hvc0"
        await guest.run("(head -n1 < /dev/hvc0 > /tmp/heard) & true")
        await port.send(b"hello hvc0\n")
        assert (await guest.run("wait $!; cat /tmp/heard")).startswith("hello hvc0")


async def is_echoed(stream: ByteStream, data: bytes) -> bool:
    """Whether the guest sends back what it is sent, while it is being sent."""
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, data)
            return await read_exactly(stream, len(data)) == data
    return False


async def test_the_host_connects_to_the_guests_sockets(guest: Guest) -> None:
    assert guest.machine.vsock is not None
    await guest.run("vsock echo 1234")
    for _ in range(2):
        async with await guest.machine.vsock.connect(1234) as stream:
            assert await is_echoed(stream, os.urandom(MIB))
    with pytest.raises(VsockRefused):
        await guest.machine.vsock.connect(1235)


async def test_the_guest_connects_to_the_hosts(guest: Guest) -> None:
    assert guest.machine.vsock is not None
    async with guest.machine.vsock.listen(5000) as listener:
        await guest.run("(vsock call 5000 hello > /tmp/answer) & true")
        with anyio.fail_after(PATIENCE_S):
            async with await listener.accept() as stream:
                assert stream.extra(VsockAttribute.peer_cid) == 42
                assert b"".join([data async for data in stream]) == b"hello"
                await stream.send(b"hello to you")
    assert (await guest.run("wait $!; cat /tmp/answer")).startswith("answer: hello to you")
    assert (await guest.run("vsock call 5001 hello")).endswith("status=1"), "nobody listens there"


async def test_a_unix_socket_leads_to_the_guest_and_another_from_it(guest: Guest) -> None:
    await guest.run("vsock echo 4321")
    async with await anyio.connect_unix(guest.uds_path) as client:
        await client.send(b"CONNECT 4321\n")
        assert (await read_until(client, b"\n")).startswith(b"OK ")
        assert await is_echoed(client, b"by a unix socket")
    async with await anyio.create_unix_listener(f"{guest.uds_path}_6000") as listener:
        await guest.run("vsock call 6000 'the other way' & true")
        with anyio.fail_after(PATIENCE_S):
            async with await listener.accept() as client:
                assert await read_exactly(client, 13) == b"the other way"


async def test_a_paused_guest_goes_on_with_its_connections(guest: Guest) -> None:
    assert guest.machine.vsock is not None
    await guest.run("vsock echo 7000")
    with anyio.fail_after(PATIENCE_S):
        async with await guest.machine.vsock.connect(7000) as stream, anyio.create_task_group() as tasks:
            assert await is_echoed(stream, b"before")
            await guest.machine.pause()
            tasks.start_soon(stream.send, b"while it sleeps")
            await anyio.sleep(0.1)
            await guest.machine.resume()
            assert await read_exactly(stream, 15) == b"while it sleeps"
            assert await is_echoed(stream, b"after")
