"""What ``asyncvmm snapshot`` and ``asyncvmm restore`` do, once the command line is understood."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import anyio
import anyio.lowlevel

from asyncvmm.accel import choose_accel
from asyncvmm.commands import WorkloadOutput, write_all
from asyncvmm.config import VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.errors import AsyncVMMError, ConfigError, GuestStopped, HostError, TriggerImpossible
from asyncvmm.events.lines import LineScanner
from asyncvmm.events.outputs import Output, SharedFile, Target, open_output, shared_file
from asyncvmm.snapshot.clones import MOST_CLONES
from asyncvmm.snapshot.resources import SnapshotResources
from asyncvmm.snapshot.savable import check_savable
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.vm import VM

OUTPUT_BYTES = 64 << 20
"""Bytes of one guest's output that are held for a stdout that is behind."""


def policy(on: Sequence[str], quiesce_ms: int, out: str) -> SnapshotResources:
    """What ``--on`` says, once: ``pre-exec``, ``listener``, ``heartbeat=N`` or ``after=MS``. Raises ConfigError."""
    if len(on) != 1:
        raise ConfigError("--on", expected="one", found=" ".join(on))
    if not out:
        raise ConfigError("--out", expected="a path that a directory can have", found=repr(out))
    return _policy(on[0], quiesce_ms, Path(out))


def _policy(on: str, quiesce_ms: int, out: Path) -> SnapshotResources:
    name, _, value = on.partition("=")
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if on == "pre-exec":
        return SnapshotResources(on_pre_exec=True, quiesce_ms=quiesce_ms, out_path=out)
    if on == "listener":
        # Without one there is nothing that `asyncvmm restore` could run.
        return SnapshotResources(on_listener=True, or_parked=False, quiesce_ms=quiesce_ms, out_path=out)
    if name == "heartbeat" and number is not None:
        return SnapshotResources(at_heartbeat=number, quiesce_ms=quiesce_ms, out_path=out)
    if name == "after" and number is not None:
        return SnapshotResources(after_ms=number, quiesce_ms=quiesce_ms, out_path=out)
    raise ConfigError("--on", expected="pre-exec, listener, heartbeat=N or after=MS", found=on)


async def take(config: VMConfig, when: SnapshotResources, jsonl: str | None, precopy: bool) -> None:
    """``asyncvmm snapshot``: boot, wait, save, stop. The workload's output until then on stdout, a line on stderr."""
    if jsonl == "-":
        raise ConfigError("--jsonl of snapshot", expected="a file", found="stdout, which the workload's output has")
    # A machine that is measured is measured once: the boot finds that done.
    check_savable(config, config.accel if config.vsock is None else (await choose_accel(config.accel)).accel)
    async with VM(config) as vm:
        if jsonl is not None:
            vm.stream_to(jsonl)
        with closing(open_output("-")) as stdout:
            snapshot = await _boot_and_save(vm, when, stdout, precopy)
    with closing(snapshot):
        manifest = snapshot.manifest
        size = f"{manifest.memory_mib} MiB as {manifest.allocated_bytes / (1 << 20):.1f} MiB"
        trigger = manifest.extra["trigger"]
        why = f"{trigger['trigger']}: {trigger['detail']}"
        print(f"{snapshot.path}: saved {size} on {manifest.machine} ({why})", file=sys.stderr)


async def _boot_and_save(vm: VM, when: SnapshotResources, stdout: Output, precopy: bool) -> Snapshot:
    result: list[Snapshot | TriggerImpossible] = []
    output = WorkloadOutput(vm)

    async def save() -> None:
        try:
            result.append(await vm.snapshot(when, precopy=precopy, then="stop"))
        except TriggerImpossible as error:
            if not vm.events.idle.done:
                raise
            result.append(error)  # once the output is written, which may say why

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(save)
            await anyio.lowlevel.checkpoint()  # it has to be asked for before the boot
            await vm.boot()
            group.start_soon(_copy_workload, vm, output, stdout)
    except BaseExceptionGroup as failed:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # what failed then is what came of it
            raise asyncio.CancelledError from None
        raise first_error(failed) from None
    if isinstance(result[0], TriggerImpossible):
        raise result[0]
    return result[0]


async def _copy_workload(vm: VM, output: WorkloadOutput, stdout: Output) -> None:
    try:
        await vm.events.pre_exec
    except GuestStopped:  # saved before there was a workload, or the boot says why
        return
    await output.copy_to(stdout)


async def restore(directory: Path, clones: int, jsonl: str | None, beyond_bend: bool) -> int:
    """``asyncvmm restore``: run until every workload has ended; gives the first exit code that is not 0, else 0."""
    if clones > MOST_CLONES and not beyond_bend:
        raise ConfigError("--clones", expected=f"at most {MOST_CLONES}, or --beyond-bend as well", found=clones)
    output = open_output(2 if jsonl == "-" else "-")
    with closing(output):
        async with await Snapshot.load(directory) as snapshot:
            with _shared(jsonl) as target:
                runs = Runs(clones, target, output)
                async with snapshot.clones(clones, prepare=runs.prepare, identity=runs.finish, beyond_bend=beyond_bend):
                    return runs.code


def _shared(jsonl: str | None) -> AbstractContextManager[Target | None]:
    """What every clone's lines can go to: a file is opened once for all."""
    if jsonl is None or jsonl.startswith("unix:"):
        return nullcontext(jsonl)
    return nullcontext(SharedFile(1, jsonl)) if jsonl == "-" else shared_file(jsonl)


class Runs:
    """The runs of some clones: their output, each line with its clone's number if there are several."""

    def __init__(self, count: int, target: Target | None, output: Output) -> None:
        self._readers: dict[int, ConsoleReader] = {}
        self._codes: dict[int, int] = {}
        self._many = count > 1
        self._target = target
        self._output = output

    @property
    def code(self) -> int:
        """Of those that have finished, the first exit code that is not 0, else 0."""
        return next((code for _, code in sorted(self._codes.items()) if code), 0)

    def prepare(self, vm: VM, number: int) -> None:
        """Listen to a clone, before anything is done with it."""
        if self._target is not None:
            vm.stream_to(self._target)
        self._readers[number] = vm.console.subscribe(OUTPUT_BYTES)

    async def finish(self, vm: VM, number: int) -> None:
        """Copy a clone's output until its workload ends, then stop it: an idle guest takes time from the others."""
        reader = self._readers[number]

        async def end() -> None:
            self._codes[number] = await vm.events.exit
            reader.end()

        async with anyio.create_task_group() as group:
            group.start_soon(_copy, reader, self._output, f"{number}: " if self._many else "")
            group.start_soon(end)
        await vm.stop()


async def _copy(reader: ConsoleReader, output: Output, prefix: str) -> None:
    """Write a guest's output, whole lines behind ``prefix`` if there is one. Raises HostError if some was lost."""
    scanner, start = LineScanner(), prefix.encode()
    async for chunk in reader:
        text = b"".join(start + line.text + b"\n" for line in scanner.feed(chunk)) if prefix else chunk
        await write_all(output, text)
    last = scanner.flush(0) if prefix else None
    if last is not None:
        await write_all(output, start + last.text + b"\n")
    if reader.lost:
        raise HostError("stdout", expected="a reader that keeps up", found=f"{reader.lost} bytes of output lost")


def first_error(failed: BaseException) -> BaseException:
    """Of errors that came together, the one to tell."""
    while isinstance(failed, BaseExceptionGroup):
        ours = [error for error in failed.exceptions if isinstance(error, AsyncVMMError | BaseExceptionGroup)]
        failed = (ours or list(failed.exceptions))[0]
    return failed
