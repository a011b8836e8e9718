"""A real Linux, two processors and a workload on both, saved at random moments: every clone goes on where it was held.

The two halves of the workload count, each with the checksum of what it has just computed, on one console. What the
original had said when it was held and what a clone says from there on must read as one text.

Moments in a normal run: 2. For more, set ASYNCVMM_LINUX_MOMENTS.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import anyio

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.snapshot.snapshot import Snapshot
from tests.lab.conftest import PATIENCE_S

MOMENTS = int(os.environ.get("ASYNCVMM_LINUX_MOMENTS", "2"))
SEED = 20261121
WANTED = 4
"""Counts that each half of a clone must get on by."""

HALF = 'i=0; while :; do i=$((i+1)); s=$(seq 1 $i | md5sum); echo "%s n=$i sum=${s%%%% *}"; done'
WORKLOAD = ("sh", "-c", f"({HALF % 'left'}) & {HALF % 'right'}")
_LINE = re.compile(rb"^(left|right) n=([0-9]+) sum=([0-9a-f]{32})\r?$")


@cache
def checksum(count: int) -> str:
    """What the guest computes."""
    return hashlib.md5("".join(f"{number}\n" for number in range(1, count + 1)).encode()).hexdigest()


def check(text: bytes) -> dict[str, int]:
    """Every line of ``text`` but its last is whole, right, and the next of its half; gives how far each half came."""
    come: dict[str, int] = {}
    for line in text.split(b"\n")[:-1]:
        found = _LINE.match(line)
        assert found, line
        half, count = found[1].decode(), int(found[2])
        assert count == come.get(half, count - 1) + 1, line
        assert found[3].decode() == checksum(count), line
        come[half] = count
    return come


def newest(text: bytes) -> bytes:
    """``text`` from the last whole line of each half on: enough to check what follows."""
    whole = text[: text.rfind(b"\n") + 1]
    return text[min(whole.rfind(b"left n="), whole.rfind(b"right n=")) :]


async def read_on(reader: ConsoleReader, said: bytes, least: dict[str, int]) -> bytes:
    """What comes until both halves have got on."""
    with anyio.fail_after(PATIENCE_S):
        while any(check(said).get(half, 0) < count for half, count in least.items()):
            said += await anext(reader)
    return said


async def clone_goes_on(snapshot: Snapshot, said: bytes) -> None:
    readers: list[ConsoleReader] = []
    before = check(said)
    async with await VM.restore(snapshot, prepare=lambda vm: readers.append(vm.console.subscribe(1 << 20))):
        await read_on(readers[0], said, {half: count + WANTED for half, count in before.items()})


async def story() -> None:
    chance = random.Random(SEED)
    async with VM(VMConfig(accel="kvm", memory_mib=128, vcpus=2, workload=WORKLOAD, boot_timeout_s=PATIENCE_S)) as vm:
        reader = vm.console.subscribe(1 << 22)
        await vm.boot()
        said = await read_on(reader, b"", {"left": 1, "right": 1})
        for moment in range(MOMENTS):
            await anyio.sleep(chance.uniform(0, 0.3))
            await vm.pause()
            async with await vm.snapshot() as snapshot:
                said += reader.take()
                await clone_goes_on(snapshot, said)
                if moment == MOMENTS - 1:
                    await clone_goes_on(snapshot, said)
            await vm.resume()
            said = newest(await read_on(reader, said, {half: count + 1 for half, count in check(said).items()}))


def test_a_linux_saved_at_any_moment_goes_on_where_it_was_held() -> None:
    anyio.run(story, backend_options={"use_uvloop": True})


def test_the_command_line_gives_clones_different_answers(tmp_path: Path) -> None:
    def asyncvmm(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "asyncvmm"), *words]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
        )
        assert done.returncode == 0, done
        return done

    workload = ("sh", "-c", "date; head -c8 /dev/urandom | od -An -tx1")
    asyncvmm("snapshot", "--accel", "kvm", "--memory", "128", "--on", "pre-exec", "--out", "s", "--", *workload)
    lines = asyncvmm("restore", "s", "--clones", "3").stdout.splitlines()
    randoms = {line.partition(": ")[2] for line in lines if "UTC" not in line}
    assert len(lines) == 6
    assert len(randoms) == 3
