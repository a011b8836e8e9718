"""asyncvmm and QEMU side by side where /dev/kvm is of the hardware kind: the same kernel, image, devices and work.

    python inside.py disk|net|vsock IO_WORK ROUNDS MS

Both guests live at once and work in turns (A B A B ...), each asked on its console. One JSON object on the last line:
the samples of every kind of work for both, and how the guests were made. Runs in the lab; ``beside_qemu.py`` sends it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import uvloop

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.device_config import DriveConfig, NetConfig, VsockConfig
from asyncvmm.machine.qemu import devices

MACHINES = ("kvm", "qemu")
BOOT_TIMEOUT_S = 300
ANSWER_TIMEOUT_S = 120
DISKS = (Path("/dev/vdc"), Path("/dev/vdd"))
"""A disk of the lab's own for each. Not a file on its root: that is a tmpfs, which no file system of a host is like."""

SECTOR = 512
PORT = 7777
VHOST_CID = 4
ANY_CID = ("vsock", str(2**32 - 1), str(PORT))
_COPY = "dd if=/dev/vda of=/io_work bs=64k 2>/dev/null; chmod +x /io_work; exec /io_work"

WORK = {
    "disk": {
        "sequential read, 1 MiB": "disk /dev/vdb read 1048576 1 seq direct {ms}",
        "sequential write, 1 MiB": "disk /dev/vdb write 1048576 1 seq direct {ms}",
        "sequential read through the page cache": "disk /dev/vdb read 1048576 1 seq cached {ms}",
        "random read, 4 KiB": "disk /dev/vdb read 4096 1 rand direct {ms}",
        "random write, 4 KiB": "disk /dev/vdb write 4096 1 rand direct {ms}",
        "random read, 4 KiB, 32 under way": "disk /dev/vdb read 4096 32 rand direct {ms}",
        "random write, 4 KiB, 32 under way": "disk /dev/vdb write 4096 32 rand direct {ms}",
    },
    "net": {
        "round trip, 64 bytes": "echo tcp {host} 7777 64 {ms}",
        "guest to host": "send tcp {host} 7777 65536 {ms}",
        "host to guest": "take tcp {host} 7777 65536 {ms}",
    },
    "vsock": {
        "round trip, 64 bytes": "echo vsock 2 7777 64 {ms}",
        "guest to host": "send vsock 2 7777 65536 {ms}",
        "host to guest": "take vsock 2 7777 65536 {ms}",
    },
}


@attrs.define
class Guest:
    """A guest that does what its console says."""

    vm: VM
    host: str
    console: ConsoleReader
    _text: bytes = b""

    async def line(self, *beginnings: bytes) -> str:
        """The next line of output that begins with one of these."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while True:
                line, newline, rest = self._text.partition(b"\n")
                if not newline:
                    self._text += await self._output()
                    continue
                self._text = rest
                if line.startswith(beginnings):
                    return line.decode(errors="replace").strip()

    async def _output(self) -> bytes:
        try:
            return await anext(self.console)
        except StopAsyncIteration:
            reason = await self.vm.events.stopped
            raise RuntimeError(f"{self.vm.accel}: {reason}: {self.vm.console.tail!r}") from None

    async def work(self, words: str) -> dict[str, float]:
        """Do it; what came out."""
        await self.vm.console.write(words.encode() + b"\n")
        answer = await self.line(b"result ", b"failed ")
        if answer.startswith("failed"):
            raise RuntimeError(f"{self.vm.accel}: {words}: {answer}")
        operations, size, took, middle, worst = map(int, answer.split()[1:])
        return {
            "per_s": operations * 1e9 / took,
            "mb_per_s": size * 1e3 / took,
            "p50_us": middle / 1e3,
            "p99_us": worst / 1e3,
        }


def config_of(kind: str, accel: str, index: int, program: Path, scratch: Path) -> VMConfig:
    """The same for both but for names and addresses."""
    wanted: dict[str, Any] = {
        "drives": [DriveConfig(path=padded(program, scratch / f"program{index}"), read_only=True)]
    }
    if kind == "disk":
        wanted["drives"].append(DriveConfig(path=warm(DISKS[index])))
    elif kind == "net":
        wanted["net"] = NetConfig(mode="tap", tap=f"bench{index}", address=f"10.9.{index}.2/24")
    else:
        wanted["vsock"] = VsockConfig(cid=3 + index, uds_path=scratch / f"vsock{index}")
    return VMConfig(
        accel=accel,  # type: ignore[arg-type]
        memory_mib=256,
        workload=("sh", "-c", _COPY),
        boot_timeout_s=BOOT_TIMEOUT_S,
        stall_timeout_s=BOOT_TIMEOUT_S,
        **wanted,
    )


def warm(disk: Path) -> Path:
    """Have all of it in the page cache: it is not the lab's disks that are measured."""
    with disk.open("rb") as stream:
        while stream.read(1 << 20):
            pass
    return disk


def padded(program: Path, target: Path) -> Path:
    """A disk whose bytes are those of the program."""
    data = program.read_bytes()
    target.write_bytes(data + bytes(-len(data) % SECTOR))
    return target


@contextmanager
def served(kind: str, index: int, program: Path, scratch: Path) -> Iterator[None]:
    """The host's end of a guest's streams: the same program, waiting."""
    where = {
        "net": ("tcp", f"10.9.{index}.1", str(PORT)),
        "vsock": ("unix", str(scratch / f"vsock{index}_{PORT}")) if MACHINES[index] == "kvm" else ANY_CID,
    }
    if kind not in where:
        yield
        return
    if kind == "net":
        subprocess.run(["ip", "addr", "add", f"10.9.{index}.1/24", "dev", f"bench{index}"], check=True)
    with subprocess.Popen([program, "serve", *where[kind]]) as server:
        try:
            yield
        finally:
            server.kill()


async def measure(kind: str, program: Path, rounds: int, ms: int) -> dict[str, Any]:
    """All work of this kind, in turns."""
    samples: dict[str, dict[str, list[dict[str, float]]]] = {name: {m: [] for m in MACHINES} for name in WORK[kind]}
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        guests = [await booted(stack, kind, index, program, scratch) for index in range(len(MACHINES))]
        for number in range(rounds):
            for name, words in WORK[kind].items():
                for machine, guest in zip(MACHINES, guests, strict=True):
                    found = await guest.work(words.format(ms=ms, host=guest.host))
                    samples[name][machine].append(found)
                    say(f"round {number}, {name}, {machine}: {found}")
        return {"samples": samples, "qemu": facts_of_qemu(), "exits": exits_of(guests[0].vm)}


async def booted(stack: AsyncExitStack, kind: str, index: int, program: Path, scratch: Path) -> Guest:
    """A guest that waits for work."""
    vm = await stack.enter_async_context(VM(config_of(kind, MACHINES[index], index, program, scratch)))
    guest = Guest(vm, f"10.9.{index}.1", vm.console.subscribe())
    await vm.boot()
    say(f"{vm.accel} is ready: {vm.timing}")
    await guest.line(b"willing")
    stack.enter_context(served(kind, index, program, scratch))
    await asyncio.sleep(0.5)
    return guest


def use_the_kernels_vsock() -> None:
    """The peer of a vsock is QEMU with the host kernel's vhost, not with a back end of ours."""
    devices._vsock = lambda fd, transport: ["-device", f"vhost-vsock-{transport},guest-cid={VHOST_CID}"]


def facts_of_qemu() -> list[str]:
    """How the peer was started: its words, without those that name descriptors."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        words = entry.read_bytes().decode(errors="replace").split("\0")
        if "qemu-system" in words[0]:
            return [word for word in words if word.startswith(("microvm", "q35", "kvm", "tcg", "virtio", "{"))]
    return []


def exits_of(vm: VM) -> dict[str, int]:
    """Where our guest's exits were: a kick has none."""
    exits = vm.exits
    return {} if exits is None else {label: entry.count for label, entry in exits.by_address.items() if "mmio" in label}


def say(text: str) -> None:
    """Progress."""
    print(f"inside: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    use_the_kernels_vsock()
    kind, program, rounds, ms = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    print(json.dumps(uvloop.run(measure(kind, program, rounds, ms))), flush=True)
