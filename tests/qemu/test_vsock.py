"""Linux on QEMU/TCG speaks to our vhost-user back end: the guest's own driver, virtio-mmio and PCI."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import orjson
import pytest

from asyncvmm.accel import probe_kvm
from asyncvmm.devices.virtio.vsock.device import VirtioVsock
from asyncvmm.errors import VsockRefused
from asyncvmm.guest import cpio
from asyncvmm.guest.archive import workload_archive
from asyncvmm.guest.store import Image, find_image
from asyncvmm.machine.qemu.vhost_user.server import VhostUserServer
from asyncvmm.metrics.groups import VsockMetrics
from asyncvmm.vsock.host import VsockHost
from asyncvmm.vsock.uds import UnixSockets
from tests.support.requirements import require

pytestmark = pytest.mark.anyio

GUESTS = Path(__file__).parents[1] / "guests"
PATIENCE_S = 40
CID, ECHO, COUNT, NOBODY, CALLED, COMMANDS = 3, 7, 9, 11, 5000, 5001
MICROVM = ["-machine", "microvm,acpi=on,isa-serial=off,auto-kernel-cmdline=off,memory-backend=ram"]
Q35 = ["-machine", "q35,memory-backend=ram"]
CMDLINE = "console=ttyS0 quiet 8250.nr_uarts=1 panic=-1"

# The first call says that both servers listen; from then on it does as it is told by the host, line by line.
SCRIPT = f"""
/vsock echo {ECHO}; /vsock count {COUNT}
/vsock call {CALLED} "hello from the guest"
while sleep 0.1; do c=$(/vsock call {COMMANDS} next) && sh -c "${{c#answer: }}"; done
"""


@attrs.define
class Guest:
    """A running QEMU, and the host's end of its sockets."""

    process: asyncio.subprocess.Process
    host: VsockHost
    metrics: VsockMetrics
    ends: list[str]
    qmp: Path

    async def execute(self, *commands: str) -> None:
        """QMP commands, one after the other."""
        reader, writer = await asyncio.open_unix_connection(str(self.qmp))
        for command in ("qmp_capabilities", *commands):
            writer.write(orjson.dumps({"execute": command}))
            while "return" not in orjson.loads(await reader.readline()):
                pass
        writer.close()
        await writer.wait_closed()


@pytest.fixture(scope="session")
def image() -> Image:
    require("qemu")
    require("image")
    return find_image("default")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """guests/vsock.c, static."""
    require("musl-gcc")
    target = tmp_path_factory.mktemp("vsock") / "vsock"
    subprocess.run(["musl-gcc", "-Os", "-static", "-o", target, GUESTS / "vsock.c"], check=True, timeout=60)
    return target.read_bytes()


@pytest.fixture
def initrd(image: Image, program: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "initrd"
    appended = cpio.write([cpio.file("vsock", program, 0o755)]) + workload_archive(["sh", "-c", SCRIPT])
    path.write_bytes(image.initrd.read_bytes() + appended)
    return path


@asynccontextmanager
async def running(machine: list[str], image: Image, initrd: Path, cmdline: str) -> AsyncIterator[Guest]:
    ours, theirs = socket.socketpair()
    metrics, ends, qmp = VsockMetrics(), list[str](), initrd.parent / "qmp"
    device = VirtioVsock(CID, metrics)
    server = VhostUserServer(device, ours, on_end=ends.append)
    host = VsockHost(device)
    kind = "device" if machine is MICROVM else "pci"
    process = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", *machine, "-accel", "tcg", "-cpu", "max", "-m", "256M"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
        *("-chardev", f"socket,id=vsock0,fd={theirs.fileno()}", "-device", f"vhost-user-vsock-{kind},chardev=vsock0"),
        *("-nodefaults", "-nographic", "-no-reboot", "-qmp", f"unix:{qmp},server=on,wait=off"),
        *("-chardev", "null,id=control", "-device", "isa-serial,chardev=control,index=1"),
        *("-chardev", f"file,id=console,path={initrd.parent / 'console'}"),
        *("-device", "isa-serial,chardev=console,index=0"),
        *("-kernel", str(image.kernel), "-initrd", str(initrd), "-append", cmdline),
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
        with anyio.fail_after(PATIENCE_S):
            yield Guest(process, host, metrics, ends, qmp)
    finally:
        process.kill()
        await process.wait()
        host.close()
        server.close()


async def first_call(guest: Guest) -> bytes:
    """What the guest says first, answered."""
    async with guest.host.listen(CALLED) as listener, await listener.accept() as stream:
        said = b"".join([chunk async for chunk in stream])
        await stream.send(b"hello from the host")
        return said


async def tell(guest: Guest, command: str) -> None:
    """Have the guest run a command. It is heard to its end first: a call cut short would not listen."""
    async with guest.host.listen(COMMANDS) as listener, await listener.accept() as stream:
        assert b"".join([chunk async for chunk in stream]) == b"next"
        await stream.send(command.encode())


async def echoed(guest: Guest, data: bytes) -> bytes:
    got = bytearray()

    async def read() -> None:
        async for chunk in stream:
            got.extend(chunk)

    async with await guest.host.connect(ECHO) as stream, anyio.create_task_group() as group:
        group.start_soon(read)
        await stream.send(data)
        await stream.send_eof()
    return bytes(got)


@pytest.fixture(scope="session")
def told_tsc() -> str:
    """What a microvm has to be told, for it has nothing to measure its TSC by."""
    require("kvm")
    return f"tsc_early_khz={probe_kvm().tsc_khz} tsc=reliable"


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_a_microvm_and_its_host_speak_both_ways(
    image: Image, initrd: Path, told_tsc: str, tmp_path: Path
) -> None:
    async with running(MICROVM, image, initrd, f"{CMDLINE} {told_tsc}") as guest:
        assert await first_call(guest) == b"hello from the guest"
        data = os.urandom(4096) * 256
        assert await echoed(guest, data) == data
        async with await guest.host.connect(COUNT) as stream:
            await stream.send(data)
            await stream.send_eof()
            answer = b"".join([chunk async for chunk in stream])
        assert answer == b"%d %d\n" % (len(data), sum(data) % 2**32)
        with pytest.raises(VsockRefused):
            await guest.host.connect(NOBODY)
        await many_at_once(guest)
        await by_unix_socket(guest, tmp_path / "v.sock")
        assert not guest.ends


async def many_at_once(guest: Guest) -> None:
    answers: dict[int, bytes] = {}

    async def talk(number: int) -> None:
        answers[number] = await echoed(guest, b"%d" % number * 1000)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(talk, number)
    assert answers == {number: b"%d" % number * 1000 for number in range(20)}


async def by_unix_socket(guest: Guest, path: Path) -> None:
    sockets = UnixSockets(guest.host, path, guest.metrics)
    sockets.start()
    async with await anyio.connect_unix(path) as client:
        await client.send(b"CONNECT %d\n" % ECHO)
        assert (await client.receive(3)) == b"OK "
        while await client.receive(1) != b"\n":
            pass
        await client.send(b"by name")
        await client.send_eof()
        assert b"".join([chunk async for chunk in client]) == b"by name"
    async with await anyio.create_unix_listener(f"{path}_{COMMANDS}") as listener, await listener.accept() as called:
        assert await called.receive() == b"next"
    await sockets.aclose()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_connections_of_a_q35_outlive_a_pause_and_end_with_the_driver(image: Image, initrd: Path) -> None:
    async with running(Q35, image, initrd, CMDLINE) as guest:
        await first_call(guest)
        stream = await guest.host.connect(ECHO)
        await stream.send(b"before")
        assert await stream.receive() == b"before"
        await guest.execute("stop", "cont")
        await stream.send(b"after")
        assert await stream.receive() == b"after"
        driver = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"
        again = f"(sleep 0.2; echo virtio0 > {driver}/unbind; echo virtio0 > {driver}/bind) &"
        await tell(guest, again)
        with pytest.raises(anyio.BrokenResourceError):
            await stream.receive()
        await stream.aclose()
        assert await echoed(guest, b"a new driver") == b"a new driver"
        assert not guest.ends
