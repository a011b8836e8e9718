"""From a snapshot to a restored guest's first output in the program's hands, beside other tools in the same run.

QEMU by itself goes on from a file, counted from exec; our QEMU machine does the same with the checks, events and
sockets that a VM has; mimobox is a wheel of PyPI whose Python calls are timed (see peers/mimobox_run.py), in a virtual
environment of its own. All have 256 MiB and guests that do nothing but speak; mimobox's is another one, its snapshots
being kernel, memory and state in one copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio.to_thread

from _bench.bench import Bench, Skipped
from _bench.figure import Figure
from _bench.qemu_saved import QemuSaved, save_by_qemu
from _bench.saved import CONDITIONS, MEMORY_MIB, saved, saved_guest
from _bench.turns import Turns, take_turns_async
from asyncvmm.errors import AsyncVMMError
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.vm import VM

DOTS = b"o"
MIMOBOX = "mimobox==0.1.0a0"
PEERS = Path(__file__).parent / "peers"
_TIMEOUT_S = 300


async def measure(bench: Bench) -> list[Figure]:
    """restore_first_output, one line for each peer; a peer that cannot be had is named with the reason."""
    async with saved(bench, DOTS) as snapshot:
        figures = []
        for peer in (_beside_qemu_kvm, _beside_qemu_tcg, _beside_our_qemu, _beside_mimobox):
            try:
                figures.append(await peer(bench, snapshot))
            except (Skipped, AsyncVMMError) as reason:
                figures.append(await _alone(bench, snapshot, f"{peer.__name__.lstrip('_')}: not measured: {reason}"))
        return figures


async def _first_output(snapshot: Snapshot) -> float:
    readers = []

    def prepare(vm: VM) -> None:
        readers.append(vm.console.subscribe())

    begin = time.monotonic_ns()
    async with await VM.restore(snapshot, prefetch=False, prepare=prepare):
        await anext(readers[0])
        return float(time.monotonic_ns() - begin)


async def _turns(bench: Bench, snapshot: Snapshot, peer: Callable[[], Awaitable[float]]) -> Turns:
    return await take_turns_async(lambda: _first_output(snapshot), peer, bench.rounds(20, 2))


async def _beside_qemu_kvm(bench: Bench, snapshot: Snapshot) -> Figure:
    return await _beside_qemu(bench, snapshot, "kvm")


async def _beside_qemu_tcg(bench: Bench, snapshot: Snapshot) -> Figure:
    return await _beside_qemu(bench, snapshot, "tcg")


async def _beside_qemu(bench: Bench, snapshot: Snapshot, accel: str) -> Figure:
    guest = saved_guest(bench)
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder:

        def save() -> QemuSaved:
            return save_by_qemu(guest, Path(holder), MEMORY_MIB, accel, DOTS)

        qemu = await anyio.to_thread.run_sync(save)

        async def sample() -> float:
            return await anyio.to_thread.run_sync(qemu.first_output)

        turns = await _turns(bench, snapshot, sample)
    return _figure(turns, f"QEMU microvm on {accel.upper()} going on from a file, from exec")


async def _beside_our_qemu(bench: Bench, snapshot: Snapshot) -> Figure:
    async with saved(bench, DOTS, accel="qemu") as other:
        turns = await _turns(bench, snapshot, lambda: _first_output(other))
    return _figure(turns, "VM.restore on our QEMU machine")


async def _alone(bench: Bench, snapshot: Snapshot, why: str) -> Figure:
    ours = [await _first_output(snapshot) for _ in range(bench.rounds(5, 1))]
    return _figure(Turns(ours, []), why)


def _figure(turns: Turns, peer: str, detail: dict[str, object] | None = None) -> Figure:
    return Figure(
        name="restore_first_output",
        unit="ms",
        ours=[value / 1e6 for value in turns.ours],
        peer_name=peer,
        peer=[value / 1e6 for value in turns.peer],
        conditions=CONDITIONS,
        detail=detail or {},
    )


# -- mimobox -----------------------------------------------------------------------------------------------------------


async def _beside_mimobox(bench: Bench, snapshot: Snapshot) -> Figure:
    """Its restores one after the other, ours in between: it is one process that is told to make the next."""
    python = await anyio.to_thread.run_sync(_mimobox_python, bench)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=bench.cache) as holder, _mimobox(python, holder) as child:
        turns = await _turns(bench, snapshot, lambda: anyio.to_thread.run_sync(_next_restore, child, found))
    detail = {name: sorted(values)[len(values) // 2] for name, values in found.items()}
    return _figure(turns, f"{MIMOBOX}, from_snapshot and a command's answer", {"mimobox_ms": detail})


@contextmanager
def _mimobox(python: Path, holder: str) -> Iterator[subprocess.Popen[str]]:
    """Running in that environment; killed after the block."""
    words = [str(python), str(PEERS / "mimobox_run.py"), str(PEERS / "mimobox.S"), holder]
    env = {**os.environ, "VM_ASSETS_DIR": holder, "HOME": holder}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        try:
            yield child
        finally:
            child.kill()


def _next_restore(child: subprocess.Popen[str], found: dict[str, list[float]]) -> float:
    """Nanoseconds. Raises Skipped with what it said instead."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):  # what it said before it ended is read below
        child.stdin.write("restore\n")
        child.stdin.flush()
    for line in child.stdout:
        if not line.startswith("{"):
            continue
        said = json.loads(line)
        if "error" in said:
            raise Skipped(f"{MIMOBOX}: {said['error']}")
        for name, took in said.items():
            found.setdefault(name, []).append(round(took / 1e6, 2))
        if "restore" in said:
            return float(said["restore"] + said["command"])
    raise Skipped(f"{MIMOBOX} has ended")


def _mimobox_python(bench: Bench) -> Path:
    """The interpreter of an environment that has it. Raises Skipped where it cannot be installed."""
    if shutil.which("gcc") is None:
        raise Skipped("no gcc to build its guest with")
    home = bench.cache / "mimobox"
    python = home / "bin" / "python"
    if bench.quick and not (home / "installed").exists():
        raise Skipped(f"no {MIMOBOX} here yet: a run that is not quick installs it")
    if not (home / "installed").exists():
        bench.say(f"installing {MIMOBOX}")
        for words in (
            [sys.executable, "-m", "venv", str(home)],
            [str(python), "-m", "pip", "install", "--quiet", MIMOBOX],
        ):
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                raise Skipped(f"{MIMOBOX} cannot be installed: {done.stderr.strip()[-200:]}")
        (home / "installed").touch()
    return python
